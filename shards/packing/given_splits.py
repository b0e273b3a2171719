"""The split that a user's files state.

By folders train/ valid/ test/, names of COCO files, the keys of data.yaml, lists of Pascal VOC
(ImageSets/Main/val.txt), or by the annotations themselves (the split of a ref of RefCOCO, a subset of CVAT).
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from cogvlm_ft.data.tars import IMAGE_EXTENSIONS
from cogvlm_ft.shards.packing.candidates import Candidate, Problem
from cogvlm_ft.shards.packing.splits import SPLITS
from cogvlm_ft.yaml_text import read_yaml

SPLIT_CHOICES = ("auto", "folders", "random", "train", "val", "test")
"""The values of --split. auto: as folders, if there are any and no --val-fraction is given, else random."""

_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
_WORD = "(?P<split>train|validation|valid|val|dev|test)(?:ing)?[0-9]*"
_IMAGES = "images|imgs|labels|annotations|set|data|obj"
_FOLDER = re.compile(rf"(?:(?:{_IMAGES})[-_])?{_WORD}(?:[-_]?(?:{_IMAGES}))?", re.IGNORECASE)
_FILE = re.compile(rf"(?:^|[-_. /]){_WORD}(?=[-_. ])", re.IGNORECASE)
_MAX_LIST_BYTES = 64 * 2**20
_MAX_VOC_DEPTH = 4
"""Folders from an annotation file up in which the lists are searched for."""
_VOC_LISTS = posixpath.join("ImageSets", "Main")
_VOC_FLAG = re.compile(r"\s+(?:-1|0|1)$")


@lru_cache(maxsize=1024)
def split_of_folder(name: str) -> str | None:
    """Return the split that a folder of this name holds, or None."""
    found = _FOLDER.fullmatch(name)
    return _NAMES[found["split"].lower()] if found else None


@lru_cache(maxsize=4096)
def split_of_path(folder: str) -> str | None:
    """Return the split of the innermost folder that names one."""
    found = (split_of_folder(part) for part in reversed(folder.split("/")))
    return next((split for split in found if split), None)


class GivenSplits:
    """Find the split that the user's files state for a candidate."""

    def __init__(self, annotations: Path, images: Path) -> None:
        self._images = images
        self._by_folder, self._by_image = _splits_of_yaml(annotations, images)
        self._voc = VocLists(annotations)

    def of(self, candidate: Candidate) -> str | None:
        """Return the split of a candidate, or None if nothing states one."""
        return (
            candidate.split
            or self._by_image.get(candidate.image)
            or (self._voc.split_of(candidate.source) if candidate.source.endswith(".xml") else None)
            or self._of_folder(posixpath.dirname(candidate.image))
            or _of_source(candidate.source)
        )

    def _of_folder(self, folder: str) -> str | None:
        above = folder
        while self._by_folder:
            if above in self._by_folder:
                return self._by_folder[above]
            if not above:
                break
            above = posixpath.dirname(above)
        return split_of_path(folder)


class VocLists:
    """The lists ImageSets/Main/train.txt, val.txt and test.txt beside folders of Pascal VOC annotations.

    A name in two of them has no split; trainval.txt and the lists of one class (dog_train.txt) state none.
    """

    def __init__(self, annotations: Path) -> None:
        self._folder = annotations if annotations.is_dir() else annotations.parent
        self._split_in = lru_cache(maxsize=64)(_voc_splits)

    def split_of(self, source: str) -> str | None:
        """Return the split of an annotation file, by its path below the annotations."""
        path = self._folder / source
        for folder in path.parents[:_MAX_VOC_DEPTH]:
            splits = self._split_in(folder)
            if splits:
                below = path.relative_to(folder).with_suffix("").as_posix()
                return splits.get(below.partition("/")[2]) or splits.get(posixpath.basename(below))
        return None


def _voc_splits(folder: Path) -> dict[str, str]:
    """Return the splits by name that the lists below a folder state."""
    splits: dict[str, str | None] = {}
    for path in sorted((folder / _VOC_LISTS).glob("*.[tT][xX][tT]")):
        split = _NAMES.get(path.stem.lower())
        try:
            is_read = split is not None and _is_list(path)
            lines = path.read_bytes().decode("utf-8-sig", "surrogateescape").splitlines() if is_read else []
        except OSError:
            continue
        for line in lines:
            name = _without_ending(_VOC_FLAG.sub("", line.strip()).strip('"'))
            _state(splits, name or None, str(split))
    return {name: split for name, split in splits.items() if split}


def _without_ending(name: str) -> str:
    stem, _, ending = name.rpartition(".")
    return stem if ending.lower() in (*IMAGE_EXTENSIONS, "xml") else name


def with_splits(
    parts: Iterable[Candidate | Problem], choice: str, annotations: Path, images: Path
) -> Iterator[Candidate | Problem]:
    """Yield the same parts, each candidate with its split by the value of --split."""
    given = GivenSplits(annotations, images)
    for part in parts:
        if isinstance(part, Problem):
            yield part
        else:
            split = choice if choice in SPLITS else given.of(part)
            yield part if part.split == split else replace(part, split=split)


def _of_source(source: str) -> str | None:
    """Return the split in the path of an annotation file in a folder, as in "instances_val2017.json: image id 3"."""
    path = source.partition(": ")[0]
    return _split_of_json(path) if path.endswith(".json") else split_of_path(posixpath.dirname(path))


@lru_cache(maxsize=4096)
def _split_of_json(path: str) -> str | None:
    found = list(_FILE.finditer(posixpath.basename(path)))
    return _NAMES[found[-1]["split"].lower()] if found else split_of_path(posixpath.dirname(path))


def _splits_of_yaml(annotations: Path, images: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the splits by folder and by image that a data.yaml states; both are relative to the images folder.

    A folder or an image that it gives to two splits has none.
    """
    by_folder: dict[str, str | None] = {}
    by_image: dict[str, str | None] = {}
    for path in _yaml_files(annotations):
        content = _load_yaml(path)
        for key in ("train", "val", "valid", "test"):
            entries = content.get(key)
            for entry in entries if isinstance(entries, list) else [entries]:
                if not isinstance(entry, str) or not entry.strip():
                    continue
                found = _locate(entry.strip(), content.get("path"), path.parent)
                if found and found.is_dir():
                    _state(by_folder, _below(found, images), _NAMES[key])
                elif found:
                    for image in _listed(found):
                        _state(by_image, _listed_image(image, images), _NAMES[key])
    return (
        {name: split for name, split in by_folder.items() if split},
        {name: split for name, split in by_image.items() if split},
    )


def _state(splits: dict[str, str | None], name: str | None, split: str) -> None:
    if name is not None and splits.setdefault(name, split) != split:
        splits[name] = None


def _yaml_files(annotations: Path) -> list[Path]:
    folder = annotations if annotations.is_dir() else annotations.parent
    places = [folder, *folder.absolute().parents[:2]]
    return next((found for place in places if (found := sorted([*place.glob("*.yaml"), *place.glob("*.yml")]))), [])


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path, yaml.BaseLoader)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and "names" in content else {}


def _locate(entry: str, root: Any, folder: Path) -> Path | None:
    """Return the folder or list of a split; Roboflow writes ../train/images for train/images."""
    roots = [folder / root, folder] if isinstance(root, str) else [folder]
    names = [entry, entry.removeprefix("../")]
    try:
        return next((place / name for place in roots for name in names if (place / name).exists()), None)
    except (OSError, ValueError):
        return None


def _listed(path: Path) -> Iterator[Path]:
    """Yield the images of a list file, which are relative to it if they begin with ./"""
    if not _is_list(path):
        return
    for line in path.read_bytes().decode("utf-8-sig", "surrogateescape").splitlines():
        if line.strip():
            yield path.parent / line.strip()


def _listed_image(path: Path, images: Path) -> str | None:
    """Return the image of a list; of a path of another machine or export, as long an end as there is."""
    below = _below(path, images)
    parts = path.parts[1:]
    ends = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((end for end in (below, *ends) if end and (images / end).is_file()), None)


def _is_list(path: Path) -> bool:
    return path.suffix.lower() == ".txt" and path.is_file() and path.stat().st_size <= _MAX_LIST_BYTES


def _below(path: Path, images: Path) -> str | None:
    """Return the path relative to the images folder, "" for the folder itself; None outside of it."""
    below = posixpath.normpath(os.path.relpath(path, images))
    if below == ".":
        return ""
    return None if below.startswith("..") else below
