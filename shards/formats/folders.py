"""Find the files of formats with one annotation file per image, and the images that may belong to them."""

from __future__ import annotations

import os
import posixpath
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from cogvlm_ft.data.tars import IMAGE_EXTENSIONS
from cogvlm_ft.errors import DataError

_ANNOTATION_FOLDERS = re.compile(
    "labels?|annot(ation)?s?|ann?o?s?|xmls?|jsons?|txts?|labelme|voc|yolo|标注(文件|数据|结果)?|标签|注释", re.I
)
_IMAGE_FOLDERS = re.compile("images?|imgs?|jpegimages|photos?|pictures?|pics|data|图[片像]|[照相]片|原图|数据", re.I)


@dataclass(frozen=True)
class AnnotationFiles:
    """Every file below `root` with this ending, or only the one that was named; paths relative to `root`."""

    root: Path
    ending: str
    only: str | None = None

    def __iter__(self) -> Iterator[str]:
        return files_below(self.root, self.ending) if self.only is None else iter([self.only])

    def stem(self, source: str) -> str:
        """Return the path without the ending."""
        return source[: -len(self.ending)]


def annotation_files(annotations: Path, ending: str) -> AnnotationFiles:
    """Return the files to read. Raises DataError if there is none.

    Memory holds the names of one folder at a time. What is hidden is left out.
    """
    if not annotations.is_dir():
        return AnnotationFiles(annotations.parent, ending, annotations.name)
    if next(files_below(annotations, ending), None) is None:
        raise DataError(f"{annotations} has no {ending} file, nor has any folder in it; expected a folder with some")
    return AnnotationFiles(annotations, ending)


def files_below(root: Path, ending: str) -> Iterator[str]:
    """Return paths relative to `root` with forward slashes, always in the same order."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        below = Path(folder).relative_to(root).as_posix()
        for name in sorted(names):
            if name.lower().endswith(ending) and not name.startswith("."):
                yield posixpath.normpath(posixpath.join(below, name))


class Photos:
    """Find images in the images folder; all paths are relative to it, "" is the folder itself.

    An annotation in `sub/` has its image in `sub/`, or where the path is the same without the words for annotations
    and images: that of `train/labels/` may be in `train/images/`, `images/train/` or `train/`.
    """

    def __init__(self, images: Path) -> None:
        self._images = images
        self._names_in = lru_cache(maxsize=16)(self._list)
        self._other_places = lru_cache(maxsize=64)(self._find_other_places)

    def at(self, path: Path) -> str | None:
        """Return the image at this path, relative to the working directory, if it is in the images folder."""
        below = posixpath.normpath(os.path.relpath(path, self._images))
        return below if not below.startswith("..") and self._is_image(below) else None

    def stated(self, folder: str, path: str) -> str | None:
        """Return the image that annotations in `folder` state: at its path, else of its name in a likely folder."""
        folders, name = posixpath.split(path)
        places = (self._images / folder / path, self._images / path) if folders else ()
        found = (self.at(place) for place in places)
        return next((image for image in found if image), None) or self.named(folder, name)

    def named(self, folder: str, name: str) -> str | None:
        """Return the image of this name that belongs to annotations in `folder`."""
        if name.rpartition(".")[2].lower() not in IMAGE_EXTENSIONS:
            return None
        places = (place for place in self._places(folder) if _contains(self._names_in(place), name))
        return next((posixpath.join(place, name) for place in places), None)

    def of_stem(self, folder: str, stem: str) -> list[str]:
        """Return the images with this name before their extension, of the most likely folder that has any."""
        found = (self.in_folder(place, stem) for place in self._places(folder))
        return next((images for images in found if images), [])

    def in_folder(self, folder: str, stem: str) -> list[str]:
        """Return the images with this name before their extension in one folder; the name may have one too."""
        names, start = self._names_in(folder), f"{stem}."
        is_name = stem.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and _contains(names, stem)
        found = [posixpath.join(folder, stem)] if is_name else []
        for i in range(bisect_left(names, start), len(names)):
            if not names[i].startswith(start):
                break
            if names[i][len(start) :].lower() in IMAGE_EXTENSIONS:
                found.append(posixpath.join(folder, names[i]))
        return found

    def _is_image(self, path: str) -> bool:
        try:
            return path.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and (self._images / path).is_file()
        except OSError:  # the name is too long, or a loop of links
            return False

    def _list(self, folder: str) -> list[str]:
        try:
            with os.scandir(self._images / folder) as entries:
                return sorted(entry.name for entry in entries)
        except OSError:
            return []

    def _places(self, folder: str) -> Iterator[str]:
        """Return the folders where the images of annotations in `folder` may be, the most likely first."""
        yield folder
        yield from self._other_places(folder)

    def _find_other_places(self, folder: str) -> list[str]:
        others = [place for place in self._by_subject.get(_subject(folder), ()) if place != folder]
        return sorted(others, key=lambda place: (not any(map(_is_for_images, place.split("/"))), place))

    @cached_property
    def _by_subject(self) -> dict[tuple[str, ...], list[str]]:
        """Return all folders by what their path says besides the words for annotations and images."""
        found: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
        for folder, subfolders, _ in os.walk(self._images):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            below = posixpath.normpath(Path(folder).relative_to(self._images).as_posix())
            below = "" if below == "." else below
            found[_subject(below)].append(below)
        return found


def _contains(names: list[str], name: str) -> bool:
    place = bisect_left(names, name)
    return place < len(names) and names[place] == name


def image_folders(folder: str) -> Iterator[str]:
    """Return the folders where the images of annotations in `folder` may be by the names of data sets, without a look.

    The most likely one comes first.
    """
    yield folder
    parts = folder.split("/")
    for i in reversed(range(len(parts))):
        if _ANNOTATION_FOLDERS.fullmatch(parts[i]):
            for name in ("images", "JPEGImages"):
                yield posixpath.join(*parts[:i], name, *parts[i + 1 :])
            yield posixpath.join("", *parts[:i], *parts[i + 1 :])


def _subject(folder: str) -> tuple[str, ...]:
    parts = folder.split("/")
    return tuple(part for part in parts if part and not (_ANNOTATION_FOLDERS.fullmatch(part) or _is_for_images(part)))


def _is_for_images(part: str) -> bool:
    return _IMAGE_FOLDERS.fullmatch(part) is not None
