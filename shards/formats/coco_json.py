"""Load a COCO object without its outlines, and read its ids, flags and boxes, also where tools write them as text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from cogvlm_ft.data.record import is_finite_number
from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.plain_files import read_file
from cogvlm_ft.shards.formats.shapes import box_around_rotated
from cogvlm_ft.shards.packing.candidates import four_numbers

_LISTS = ("images", "annotations", "categories")
_OUTLINE_BOX = "outline box"
"""Key under which the box around an outline replaces the outline."""
_OUTLINE_BESIDE = "outline box beside bbox"
_MAX_BESIDE = 1000
_ROTATION = "rotation"
_MAX_SIDE = 10**6
_MAX_RUN_BITS = 45
_FALSE = ("", "0", "0.0", "false", "none", "null")
Value = TypeVar("Value")


class ById(Generic[Value]):
    """Values by id. An id may be a number in one list and the same number as text in another.

    num_by_text: how many were found although the type differs.
    """

    def __init__(self) -> None:
        self._values: dict[Any, Value] = {}
        self._by_text: dict[str, list[Any]] = {}
        self.num_by_text = 0

    def __contains__(self, number: Any) -> bool:
        return number in self._values

    def __setitem__(self, number: Any, value: Value) -> None:
        if number not in self._values:
            self._by_text.setdefault(_text_of(number), []).append(number)
        self._values[number] = value

    def values(self) -> Iterator[Value]:
        """Yield the values in the order of their ids in the file."""
        return iter(self._values.values())

    def get(self, number: Any) -> Value | None:
        """Return the value of exactly this id, or None."""
        return self._values.get(number)

    def find(self, number: Any) -> Value:
        """Return the value of this id, or of the only one with the same text. Raises KeyError."""
        if number in self._values:
            return self._values[number]
        (same,) = self._by_text.get(_text_of(number), [None]) if number is not None else [None]
        value = self._values[same]
        self.num_by_text += 1
        return value


def load_coco(path: Path) -> dict[str, Any]:
    """Load the object; each outline is replaced by the box around it where there is no bbox. Raises DataError."""
    try:
        text = read_file(path).removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
        content = json.loads(text, object_hook=_Outlines().replace)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; expected COCO instances JSON") from None
    except (ValueError, RecursionError) as error:
        hint = "for one JSON object per line use --format jsonl"
        raise DataError(f"{path} is not valid JSON: {error}; expected one COCO instances object ({hint})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; expected a COCO object with {', '.join(_LISTS)}")
    missing = [name for name in _LISTS if not isinstance(content.get(name), list)]
    if missing:
        found = ", ".join(sorted(content)[:10]) or "nothing"
        missing_names = " or ".join(missing)
        raise DataError(f"{path} has no list called {missing_names}; found {found}; expected COCO instances JSON")
    first = next(iter(content["annotations"]), None)
    if isinstance(first, dict) and "segments_info" in first:
        raise DataError(
            f"{path} is COCO's panoptic JSON, which has segments; expected the instances JSON of these images"
        )
    return content


def is_crowd(annotation: dict[str, Any]) -> bool:
    """Return the flag, which some tools write as text."""
    flag = annotation.get("iscrowd")
    return flag.strip().lower() not in _FALSE if isinstance(flag, str) else bool(flag)


def box_of(annotation: dict[str, Any]) -> tuple[Box, str | None]:
    """Return (corners, what they are around if not the bbox itself: "outline" or "rotated"). Raises Rejected."""
    outline = annotation.get(_OUTLINE_BOX)
    if outline is not None:
        return outline, "outline"
    x, y, width, height = four_numbers(as_numbers(annotation.get("bbox")), "[x, y, width, height]")
    box = x, y, x + width, y + height
    degrees = _rotation(annotation)
    if not degrees % 360:
        return box, None
    return box_around_rotated(box, degrees, (x + width / 2, y + height / 2)), "rotated"


def _rotation(annotation: dict[str, Any]) -> float:
    """Return the degrees by which CVAT's bbox is rotated around its center, clockwise; 0 for an upright one."""
    attributes = annotation.get("attributes")
    degrees: Any = attributes.get(_ROTATION) if isinstance(attributes, dict) else None
    return float(degrees) if is_finite_number(degrees) else 0.0


def _text_of(number: Any) -> str:
    is_whole = isinstance(number, float) and number.is_integer()
    return str(int(number) if is_whole else number).strip()


def as_numbers(bbox: Any) -> Any:
    """Return the list with numbers for texts of numbers; anything else as it is."""
    if not isinstance(bbox, list) or not any(isinstance(side, str) for side in bbox):
        return bbox
    try:
        return [float(side) if isinstance(side, str) else side for side in bbox]
    except ValueError:
        return bbox


def outline_beside(annotation: dict[str, Any]) -> Box | None:
    """Return the box around the outline of an annotation that has a bbox too, of the first ones of a file."""
    return annotation.get(_OUTLINE_BESIDE)


class _Outlines:
    """Replaces outlines by the boxes around them: where there is no bbox, and for the first annotations anyway."""

    def __init__(self) -> None:
        self._num_beside = 0

    def replace(self, value: dict[str, Any]) -> dict[str, Any]:
        """Return an object of the JSON without its outline."""
        outline = value.pop("segmentation", None)
        if not outline:
            return value
        bbox = value.get("bbox")
        if isinstance(value.get("attributes"), dict):
            value["attributes"].pop(_ROTATION, None)  # the bbox is around the outline of the rotated box
        has_bbox = isinstance(bbox, list) and any(bbox)
        if has_bbox and (self._num_beside >= _MAX_BESIDE or not isinstance(outline, list)):
            return value
        box = _box_around(outline)
        if box:
            value[_OUTLINE_BESIDE if has_bbox else _OUTLINE_BOX] = box
            self._num_beside += has_bbox
        return value


def _box_around(outline: Any) -> Box | None:
    """Return the box around polygons or a mask; None if it cannot be read or is empty."""
    try:
        if isinstance(outline, dict):
            return _box_around_mask(outline["counts"], outline["size"])
        flat = outline if is_finite_number(outline[0]) else [number for polygon in outline for number in polygon]
        points = np.asarray(flat, dtype=np.float64).reshape(-1, 2)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError):
        return None
    if not len(points) or not np.isfinite(points).all():
        return None
    (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return x0, y0, x1, y1


def _box_around_mask(counts: Any, size: Any) -> Box | None:
    """Return the box around a mask in COCO's run lengths, which go down the columns. counts: a list, or as text."""
    height, width = size
    runs = np.asarray(_runs_of_text(counts) if isinstance(counts, str) else counts, dtype=np.int64)
    if not (0 < height < _MAX_SIDE and 0 < width < _MAX_SIDE) or (runs < 0).any() or runs.sum() != height * width:
        return None
    ends = np.cumsum(runs)
    starts, stops = (ends - runs)[1::2], ends[1::2]
    starts, stops = starts[stops > starts], stops[stops > starts] - 1
    if not len(starts):
        return None
    columns, rows = (starts // height, stops // height), (starts % height, stops % height)
    is_tall = columns[0] != columns[1]  # it reaches the bottom of one column and the top of the next
    top = 0 if is_tall.any() else rows[0].min()
    bottom = height - 1 if is_tall.any() else rows[1].max()
    return float(columns[0].min()), float(top), float(columns[1].max() + 1), float(bottom + 1)


def _runs_of_text(text: str) -> list[int]:
    """Return the run lengths of COCO's compressed text: 5 bits a character, from the third on as differences."""
    runs: list[int] = []
    value = shift = 0
    for code in text.encode("ascii"):
        bits = code - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if shift > _MAX_RUN_BITS:
            raise ValueError("a run length without end")
        if not bits & 0x20:
            if bits & 0x10:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    return runs
