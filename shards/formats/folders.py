"""Find the files of formats with one annotation file per image, and the image of each."""

from __future__ import annotations

import os
import posixpath
from bisect import bisect_left
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from cogvlm_ft.data.tars import IMAGE_EXTENSIONS
from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.packing.candidates import Rejected

_ANNOTATION_FOLDERS = ("labels", "annotations")
_IMAGE_FOLDERS = ("images", "JPEGImages")


def annotation_files(annotations: Path, ending: str) -> tuple[Path, Iterator[str]]:
    """Return (folder, paths in it): every file with this ending, in subfolders too, or the one named file.

    Raises DataError if there is none. Memory holds the names of one folder at a time. What is hidden is left out.
    """
    if not annotations.is_dir():
        return annotations.parent, iter([annotations.name])
    if next(files_below(annotations, ending), None) is None:
        raise DataError(f"{annotations} has no {ending} file, nor has any folder in it; expected a folder with some")
    return annotations, files_below(annotations, ending)


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

    An annotation in `sub/` has its image in `sub/`; one in `train/labels/` may also have it in `train/images/`.
    """

    def __init__(self, images: Path) -> None:
        self._images = images
        self._names_in = lru_cache(maxsize=8)(self._list)

    def at(self, path: Path) -> str | None:
        """Return the image at this path, relative to the working directory, if it is in the images folder."""
        below = posixpath.normpath(os.path.relpath(path, self._images))
        return below if not below.startswith("..") and self._is_image(below) else None

    def named(self, folder: str, name: str) -> str | None:
        """Return the image of this name that belongs to annotations in `folder`."""
        paths = (posixpath.join(place, name) for place in image_folders(folder))
        return next((path for path in paths if self._is_image(path)), None)

    def of_stem(self, folder: str, stem: str) -> str | None:
        """Return the image with this name before its extension. Raises Rejected if a folder has several."""
        for place in image_folders(folder):
            names = self._names_in(place)
            found = []
            for i in range(bisect_left(names, f"{stem}."), len(names)):
                if not names[i].startswith(f"{stem}."):
                    break
                if names[i][len(stem) + 1 :].lower() in IMAGE_EXTENSIONS:
                    found.append(posixpath.join(place, names[i]))
            if len(found) > 1:
                detail = f"{' and '.join(found)} could both belong to it; name or remove one"
                raise Rejected("sample", "ambiguous_image", detail)
            if found:
                return found[0]
        return None

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


def image_folders(folder: str) -> Iterator[str]:
    """Return the folders where the images may be, the most likely first."""
    yield folder
    parts = folder.split("/")
    for i in reversed(range(len(parts))):
        if parts[i].lower() in _ANNOTATION_FOLDERS:
            for name in _IMAGE_FOLDERS:
                yield posixpath.join(*parts[:i], name, *parts[i + 1 :])
            yield posixpath.join("", *parts[:i], *parts[i + 1 :])
