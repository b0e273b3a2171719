"""YOLO: one .txt file per image, one line per box, and a file of class names.

0 0.5 0.5 0.2 0.1            class, then centre x, centre y, width, height as fractions of the image

A confidence after the box is ignored. A line with a class and three or more points x y is an outline and becomes the
box around it. The names are in the nearest classes.txt, *.names or *.yaml (with `names:`): in the folder of the labels
or above, up to two folders above the annotations. Images without a .txt file are ignored.
"""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.formats.folders import Photos, annotation_files, files_below
from cogvlm_ft.shards.formats.rows import read_head
from cogvlm_ft.shards.packing.candidates import (
    Candidate,
    Problem,
    Rejected,
    check_text,
    four_numbers,
    make_targets,
    number,
    shown,
)
from cogvlm_ft.shards.packing.files import read_inside

_ENDING = ".txt"
_NAME_FILES = ("classes.txt", "*.names", "*.yaml", "*.yml")
"""The preferred one first."""
_NUMBER = re.compile("[0-9]{1,6}")
_FOLDERS_ABOVE = 2
_MAX_BYTES = 16 * 2**20
_MAX_NAMES_BYTES = 2**20
_BOX, _BOX_AND_CONFIDENCE, _OUTLINE = 5, 6, 7
"""Columns: the minimum of an outline, which always has an odd number."""

Names = dict[int, str]


def read_yolo(annotations: Path, images: Path) -> Iterator[Candidate | Problem]:
    """Yield one candidate per label file, one target per class. Raises DataError without class names.

    An image is found by its name without extension.
    """
    if not annotations.is_dir():
        raise DataError(f"{annotations} is not a folder; expected the folder of the YOLO .txt files")
    root, files = annotation_files(annotations, _ENDING)
    photos = Photos(images)
    names_in: dict[str, Names] = {}
    for file in files:
        if posixpath.basename(file) in _NAME_FILES and not _is_label_file(root / file):
            continue
        folder = posixpath.dirname(file)
        if folder not in names_in:
            names_in[folder] = _class_names(root, folder)
        try:
            check_text(file, "sample")
            yield _candidate(read_inside(root, file, "annotation", _MAX_BYTES), file, names_in[folder], photos)
        except Rejected as rejected:
            yield rejected.problem(file)


def recognise_yolo(annotations: Path) -> str | None:
    """Look for a .txt file in the folder that begins with a line of at least five numbers."""
    if not annotations.is_dir():
        return None
    files = list(files_below(annotations, _ENDING))
    is_yolo = any(_is_label_file(annotations / file) for file in files[:100])
    return f"{len(files)} .txt files with YOLO lines" if is_yolo else None


def _is_label_file(path: Path) -> bool:
    columns = read_head(path, 4096).split(b"\n")[0].split()
    return len(columns) >= _BOX and _is_numbers(column.decode("latin-1") for column in columns)


def _is_numbers(columns: Iterable[str]) -> bool:
    try:
        for column in columns:
            float(column)
    except ValueError:
        return False
    return True


def _class_names(root: Path, folder: str) -> Names:
    """Return the class names. Raises DataError if there is no such file, or two of one kind that differ."""
    below = Path(folder)
    inside = [root / place for place in (below, *below.parents)] if folder else [root]
    for place in [*inside, *root.absolute().parents[:_FOLDERS_ABOVE]]:
        for pattern in _NAME_FILES:
            found = {path: _names_of(path) for path in sorted(place.glob(pattern)) if path.is_file()}
            found = {path: names for path, names in found.items() if names}
            if len({tuple(names.items()) for names in found.values()}) > 1:
                files = " and ".join(path.name for path in found)
                raise DataError(f"{place} has {files} with different class names. Keep only the correct one.")
            if found:
                return next(iter(found.values()))
    expected = ", ".join(_NAME_FILES)
    raise DataError(f"no file of class names for the YOLO labels in {root / folder}: none of {expected} there or above")


def _names_of(path: Path) -> Names:
    """Return the class names by number from 0; empty if the file has none."""
    try:
        data = read_inside(path.parent, path.name, "annotation", _MAX_NAMES_BYTES)
    except Rejected:
        return {}
    text = data.decode("utf-8-sig", "surrogateescape")
    if path.suffix in (".yaml", ".yml"):
        return _names_of_yaml(text)
    if path.suffix == _ENDING and _is_label_file(path):
        return {}
    return {i: line.strip() for i, line in enumerate(text.split("\n")) if line.strip()}


def _names_of_yaml(text: str) -> Names:
    """Return `names:`, a list or a mapping of numbers. BaseLoader reads text only, so that class "no" is not False."""
    try:
        content = yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    names = content.get("names") if isinstance(content, dict) else None
    by_number: Any = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(by_number, dict):
        return {}
    return {int(i): name for i, name in by_number.items() if _NUMBER.fullmatch(str(i)) and isinstance(name, str)}


def _candidate(data: bytes, source: str, names: Names, photos: Photos) -> Candidate:
    """Return the candidate of a label file. Raises Rejected if no line has numbers."""
    problems: list[Problem] = []
    boxes_of: dict[str, list[Box | None]] = {}  # None: an unusable box
    lines = list(enumerate(data.decode("utf-8-sig", "surrogateescape").split("\n"), start=1))
    rows = [(i, line.split()) for i, line in lines if line.strip()]
    if rows and not any(_is_numbers(columns) for _, columns in rows):
        expected = "lines of a class number and a box"
        detail = f"no line has numbers only; expected {expected}; first: {shown(rows[0][1])}"
        raise Rejected("sample", "bad_file", detail)
    for i, columns in rows:
        try:
            boxes = boxes_of.setdefault(_class_name(columns[0], names), [])
            boxes.append(None)
            boxes[-1] = _box([number(column, "a column") for column in columns])
        except Rejected as rejected:
            problems.append(rejected.problem(f"{source}:{i}"))
    stem = source[: -len(_ENDING)]
    return Candidate(
        image=photos.of_stem(posixpath.dirname(stem), posixpath.basename(stem)) or f"{stem}.jpg",
        key=None,
        source=source,
        targets=make_targets(boxes_of, source, problems),
        units="unit",
        problems=tuple(problems),
    )


def _class_name(column: str, names: Names) -> str:
    value = number(column, "the class number")
    if value not in names:
        raise Rejected("box", "unknown_class", f"class {column:.20} has no name; there are {len(names)} names")
    return names[int(value)]


def _box(columns: list[float]) -> Box:
    """Return the corners as fractions of the image. Raises Rejected."""
    num_columns = len(columns)
    if num_columns in (_BOX, _BOX_AND_CONFIDENCE):
        x, y, width, height = four_numbers(columns[1:5], "x y width height")
        corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    elif num_columns >= _OUTLINE and num_columns % 2 == 1:
        if not all(math.isfinite(column) for column in columns):
            raise Rejected("box", "not_finite", "a point of the outline is not finite")
        xs, ys = columns[1::2], columns[2::2]
        corners = [min(xs), min(ys), max(xs), max(ys)]
    else:
        expected = "class x y width height, or class and three or more points"
        raise Rejected("box", "wrong_number_of_coordinates", f"{num_columns} columns; expected {expected}")
    return four_numbers(corners, "of corners")
