"""Find the photos that one file lists by name, as tools put them beside the file, and read several such files."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from cogvlm_ft.shards.formats.folders import image_folders
from cogvlm_ft.shards.packing.candidates import Candidate, Problem, Rejected

_IMAGE_FOLDERS = ("", "images", "data", "JPEGImages")


class ListedPhotos:
    """The photos of one file. All paths are relative to the images folder.

    folder: the folder of the file, below that of the annotations. subsets: folders that only belong to this file.
    """

    def __init__(self, images: Path, folder: str, *subsets: str) -> None:
        self._images = images
        self._folder = folder
        folders = list(dict.fromkeys((*image_folders(folder), *_IMAGE_FOLDERS)))
        own = [posixpath.join(place, subset) for place in folders for subset in subsets]
        self._places = [[place for place in places if (images / place).is_dir()] for places in (own, folders)]

    def find(self, *stated: str) -> str:
        """Return the first of these names that is there; the path of the first name if there is none.

        Raises Rejected if several photos fit equally well.
        """
        for name in stated:
            found = self._find(name)
            if found:
                return found
        return posixpath.normpath(posixpath.join(self._folder, stated[0]))

    def _find(self, stated: str) -> str | None:
        own = posixpath.normpath(posixpath.join(self._folder, stated))
        if self._is_file(own):
            return own
        for places in self._places:
            paths = (posixpath.normpath(posixpath.join(place, stated)) for place in places)
            found = [path for path in dict.fromkeys(paths) if self._is_file(path)]
            if len(found) > 1:
                detail = f"{stated!r:.200} could be {' or '.join(found)}; remove one, or pass its folder as --images"
                raise Rejected("sample", "ambiguous_image", detail)
            if found:
                return found[0]
        return None

    def _is_file(self, path: str) -> bool:
        try:
            return (self._images / path).is_file()
        except (OSError, ValueError):  # the name is too long, or has a NUL
            return False


def read_files(files: Iterable[tuple[str, Iterator[Candidate | Problem]]]) -> Iterator[Candidate | Problem]:
    """Yield the parts of several files, each with the name of its file as source; a photo belongs to the first one."""
    file_of: dict[str, str] = {}
    for name, parts in files:
        for part in parts:
            if isinstance(part, Problem):
                yield _sourced(part, name)
                continue
            problems = tuple(_sourced(problem, name) for problem in part.problems)
            candidate = replace(part, source=f"{name}: {part.source}", problems=problems)
            if file_of.setdefault(candidate.image, name) == name:
                yield candidate
            else:
                yield from problems
                detail = f"{candidate.image} is also listed in {file_of[candidate.image]}. Remove one of the two files."
                yield Problem("sample", "image_in_two_files", detail, candidate.source)


def once_per_photo(parts: Iterable[Candidate | Problem]) -> Iterator[Candidate | Problem]:
    """Yield the parts of one file; a photo that is listed again becomes a problem."""
    source_of: dict[str, str] = {}
    for part in parts:
        if isinstance(part, Candidate) and part.image in source_of:
            yield from part.problems
            detail = f"{part.image} is also {source_of[part.image]}. Remove one of the two."
            yield Problem("sample", "image_listed_again", detail, part.source)
            continue
        if isinstance(part, Candidate):
            source_of[part.image] = part.source
        yield part


def _sourced(problem: Problem, name: str) -> Problem:
    return replace(problem, source=f"{name}: {problem.source}")
