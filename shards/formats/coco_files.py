"""Find the COCO files of a folder, and the photos that each one lists.

Layouts: _annotations.coco.json beside its photos (Roboflow), annotations/instances_val2017.json with val2017/ or
images/val2017/ (COCO, CVAT), labels.json with data/ (FiftyOne), result.json with images/ (Label Studio).
"""

from __future__ import annotations

import os
import posixpath
import re
from itertools import islice
from pathlib import Path

from cogvlm_ft.shards.formats.folders import files_below
from cogvlm_ft.shards.formats.listed_photos import ListedPhotos
from cogvlm_ft.shards.packing.files import read_ends

_LISTS = ("images", "annotations", "categories")
_ENDING = ".json"
_ENDS_BYTES = 2**16
_MAX_INSPECTED = 50
_REFS = re.compile(r"g?refs\(\w+\)\.(p|json)")
_INSTANCES = "instances_"
_SUBSET = re.compile(r"(?:instances|person_keypoints|annotations?|coco)[-_](.+)")


def lists_in(path: Path) -> list[str]:
    """Return the names of COCO's lists at both ends of the file; none if it is of another format.

    MDETR's token spans and panoptic segments are other formats.
    """
    ends = read_ends(path, _ENDS_BYTES)
    is_object = ends.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"{"
    is_coco = b'"category_id"' in ends and (b'"bbox"' in ends or b'"segmentation"' in ends)
    is_other = any(name in ends for name in (b'"tokens_', b'"segments_info"', b'"shapes"'))
    if not is_object or not is_coco or is_other:
        return []
    return [name for name in _LISTS if f'"{name}"'.encode() in ends]


def coco_files(folder: Path) -> list[str]:
    """Return the COCO files below the folder."""
    return [name for name in files_below(folder, _ENDING) if lists_in(folder / name)]


def recognised_files(folder: Path) -> list[str]:
    """Return COCO files below the folder, inspecting the first .json files.

    None if most files are of another format, which one file may be exported from, or if RefCOCO's refs are there.
    """
    names = list(islice(files_below(folder, _ENDING), _MAX_INSPECTED))
    found = [name for name in names if lists_in(folder / name)]
    has_refs = any(_REFS.fullmatch(entry) for entry in os.listdir(folder))  # noqa: PTH208
    return found if 2 * len(found) >= len(names) and not has_refs else []


def without_repeats(names: list[str]) -> tuple[list[str], list[str]]:
    """Return (files to read, files to leave out): beside instances_*.json others have the same photos again."""
    folders = {posixpath.dirname(name) for name in names if posixpath.basename(name).startswith(_INSTANCES)}
    repeats = [
        name
        for name in names
        if posixpath.dirname(name) in folders and not posixpath.basename(name).startswith(_INSTANCES)
    ]
    return [name for name in names if name not in repeats], repeats


def listed_photos(images: Path, name: str) -> ListedPhotos:
    """Return the photos of the file; instances_val2017.json and val2017.json have them in val2017/."""
    folder, base = posixpath.split(name)
    stem = base[: -len(_ENDING)] if base.lower().endswith(_ENDING) else base
    match = _SUBSET.fullmatch(stem)
    return ListedPhotos(images, folder, match[1] if match else stem)
