"""Read the columns of YOLO label lines: a box or an outline, perhaps with more that only the whole source explains.

Predictions have a confidence and a track id after the box or outline, rotated boxes an angle, poses keypoints after the
box. A line that could be two of these is refused.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.formats.folders import AnnotationFiles
from cogvlm_ft.shards.formats.rows import read_head
from cogvlm_ft.shards.packing.candidates import Rejected, four_numbers, number
from cogvlm_ft.shards.packing.files import read_inside

MAX_BYTES = 16 * 2**20
_BOX, _BOX_AND_ONE, _BOX_AND_TWO, _TWO_MORE_POINTS = 5, 6, 7, 9
"""Number of columns, including the class."""
_TRAILING = "Export labels rather than predictions, or without save_conf=True and track ids."
_OUTLINES = "If they are outlines, write `task: segment` into data.yaml."
_NEARLY_ALL = 0.9
_LARGEST = 2
_OUTSIDE = 0.05
"""How far a keypoint may be outside its box, as a fraction of the image."""


def is_label_file(path: Path) -> bool:
    """Return whether the file begins with a line of at least five numbers."""
    columns = next(iter(read_head(path, 4096).splitlines()), b"").split()
    return len(columns) >= _BOX and is_numbers(column.decode("latin-1") for column in columns)


def is_box(columns: list[str]) -> bool:
    """Return whether these are the columns of a box, perhaps with a confidence."""
    return len(columns) in (_BOX, _BOX_AND_ONE)


def is_numbers(columns: Iterable[str]) -> bool:
    """Return whether every column is a number."""
    return _numbers(columns) is not None


class LabelLines:
    """The lines of all label files. They are read in advance only if some have more columns than a box."""

    def __init__(self, files: AnnotationFiles) -> None:
        self._files = files
        self.num_confidences = 0

    def box(self, texts: list[str], num_keypoint_columns: int | None, *, outlines: bool) -> Box:
        """Return the corners as fractions of the image. Raises Rejected.

        num_keypoint_columns: after the box, if data.yaml states them. outlines: data.yaml states that all lines are.
        """
        columns = [number(text, "a column") for text in texts]
        num_columns = len(columns)
        if num_columns < _BOX:
            expected = "class x y width height, or class and three or more points"
            raise Rejected("box", "wrong_number_of_coordinates", f"{num_columns} columns; expected {expected}")
        if num_columns == _BOX:
            return _box(columns)
        if num_columns == _BOX_AND_ONE:
            self._check_confidence(columns[5], outlines=outlines)
            self.num_confidences += 1
            return _box(columns)
        if num_keypoint_columns is not None:
            more = num_columns - _BOX - num_keypoint_columns
            if more not in (0, 1, 2):  # a confidence and a track id
                expected = f"{_BOX + num_keypoint_columns}, according to kpt_shape"
                raise Rejected("box", "wrong_number_of_coordinates", f"{num_columns} columns; expected {expected}")
            return _box(columns)
        if not (outlines and num_columns % 2):
            self._check_outline(texts, columns)
        return _box_around(columns)

    def _check_confidence(self, value: float, *, outlines: bool) -> None:
        if outlines:
            expected = "an outline, according to task in data.yaml"
            advice = "Export four corners rather than a box with an angle, or correct task."
            raise Rejected("box", "ambiguous_columns", f"6 columns; expected {expected}. {advice}")
        if self._seen.confidence_is_first:
            detail = (
                "6 columns, of which the first after the class seems to be a confidence: the last four fit as a box"
            )
            raise Rejected("box", "ambiguous_columns", f"{detail}; expected class x y width height. {_TRAILING}")
        if 0 <= value <= 1 and not self._seen.sixth_is_no_confidence:
            return
        found = (
            f"the sixth number is {value:g}" if not 0 <= value <= 1 else "other lines have a sixth number outside 0..1"
        )
        detail = f"6 columns, and {found}: an angle or a track id; expected class x y width height"
        advice = "Export upright boxes, or remove the sixth number if it is not an angle."
        raise Rejected("box", "ambiguous_columns", f"{detail}. {advice}")

    def _check_outline(self, texts: list[str], columns: list[float]) -> None:
        """Raise Rejected unless the line can only be an outline."""
        num_columns, seen = len(columns), self._seen
        if num_columns % 2 == 0:
            found = "an outline with a confidence, or a box with keypoints"
        elif _may_have_visibility(columns):
            found = "a box with keypoints and their visibility, or an outline"
        elif num_columns == _BOX_AND_TWO and (seen.has_confidences or not seen.has_long_outlines):
            found = "a box with confidence and track id, or an outline of three points"
        elif seen.has_ids and _may_end_with_id(texts):
            found = "an outline, perhaps with a confidence and a track id at its end"
        elif seen.look_like_poses:
            found = "an outline, or a box with keypoints"
        else:
            return
        advice = f"{_TRAILING} For keypoints, write kpt_shape into data.yaml. {_OUTLINES if num_columns % 2 else ''}"
        raise Rejected("box", "ambiguous_columns", f"{num_columns} columns: {found}. {advice}".rstrip())

    @cached_property
    def _seen(self) -> _Seen:
        seen = _Seen()
        for source in self._files:
            try:
                data = read_inside(self._files.root, source, "annotation", MAX_BYTES)
            except Rejected:
                continue
            for line in data.splitlines():
                columns = line.split()
                if len(columns) > _BOX:
                    seen.add([column.decode("latin-1") for column in columns])
        return seen


class _Seen:
    """The common properties of the lines of a source that have more columns than a box."""

    def __init__(self) -> None:
        self.has_confidences = False
        self.sixth_is_no_confidence = False
        self.has_long_outlines = False
        self._num_outlines: Counter[int] = Counter()
        self._num_ids = 0
        self._has_id_above_1 = False
        self._num_like_poses = 0
        self._num_sixes = self._num_first = self._num_first_only = 0

    def add(self, columns: list[str]) -> None:
        """Count a line. One that is not of numbers counts for nothing."""
        num_columns, ends = len(columns), _numbers(columns[-2:])
        if ends is None:
            return
        if num_columns == _BOX_AND_ONE:
            self.has_confidences = True
            self.sixth_is_no_confidence |= not 0 <= ends[1] <= 1
            self._add_six(_numbers(columns) or [])
            return
        if num_columns % 2 == 0:
            return
        self.has_long_outlines |= num_columns >= _TWO_MORE_POINTS
        self._num_outlines[num_columns] += 1
        self._num_ids += _may_end_with_id(columns)
        self._has_id_above_1 |= _may_end_with_id(columns) and ends[1] > 1
        if len(self._num_outlines) == 1:
            self._num_like_poses += _is_like_pose(_numbers(columns) or [])

    def _add_six(self, numbers: list[float]) -> None:
        """Count in which places the box of a line with one more number may be."""
        if not numbers:
            return
        is_first = 0 <= numbers[1] <= 1 and _is_inside(numbers[2:])
        self._num_sixes += 1
        self._num_first += is_first
        self._num_first_only += is_first and not _is_inside(numbers[1:5])

    @property
    def confidence_is_first(self) -> bool:
        """Return whether the last four numbers are a box in all lines, and the four after the class not in all."""
        return self._num_first_only > 0 and self._num_first == self._num_sixes

    @property
    def has_ids(self) -> bool:
        """Return whether outlines end with a track id: nearly all may, or one does that is not a coordinate."""
        return self._has_id_above_1 or self._num_ids >= _NEARLY_ALL * self._num_outlines.total()

    @property
    def look_like_poses(self) -> bool:
        """Return whether all lines have one length, and nearly all could be a box with the keypoints in it."""
        return len(self._num_outlines) == 1 and self._num_like_poses >= _NEARLY_ALL * self._num_outlines.total()


def _numbers(columns: Iterable[str]) -> list[float] | None:
    try:
        return [float(column) for column in columns]
    except ValueError:
        return None


def _is_inside(box: list[float]) -> bool:
    """Return whether x y width height is a box inside the image."""
    x, y, width, height = box
    sides = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    return min(width, height) > 0 and min(sides) >= -_OUTSIDE and max(sides) <= 1 + _OUTSIDE


def _check_fractions(values: Iterable[float]) -> None:
    """Raise Rejected for values that are far from fractions."""
    largest = max(values, key=abs, default=0.0)
    if math.isfinite(largest) and abs(largest) > _LARGEST:
        expected = "fractions of the photo, from 0 to 1. Divide pixels by its width and height"
        raise Rejected("box", "box_outside_image", f"a value is {largest:g}; expected {expected}.")


def _box(columns: list[float]) -> Box:
    x, y, width, height = four_numbers(columns[1:5], "x y width height")
    box = four_numbers([x - width / 2, y - height / 2, x + width / 2, y + height / 2], "of corners")
    _check_fractions(columns[1:5])
    return box


def _box_around(columns: list[float]) -> Box:
    if not all(map(math.isfinite, columns)):
        raise Rejected("box", "not_finite", "a point of the outline is not finite")
    _check_fractions(columns[1:])
    xs, ys = columns[1::2], columns[2::2]
    return four_numbers([min(xs), min(ys), max(xs), max(ys)], "of corners")


def _may_have_visibility(columns: list[float]) -> bool:
    """Return whether every third number after a box is 0, 1 or 2, as the visibility of a keypoint is."""
    return (len(columns) - _BOX) % 3 == 0 and all(value in (0, 1, 2) for value in columns[7::3])


def _may_end_with_id(columns: list[str]) -> bool:
    """Return whether the last number is whole, and written as tools write an id after a confidence."""
    return columns[-1].isdigit() and columns[-1] != "0" and not columns[-2].isdigit()


def _is_like_pose(columns: list[float]) -> bool:
    """Return whether the line can be a box inside the image and points in the box; (0, 0) is a point not seen."""
    if not columns:
        return False
    x, y, width, height = columns[1:5]
    left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    if min(left, top) < -_OUTSIDE / 10 or max(right, bottom) > 1 + _OUTSIDE / 10:
        return False
    points = zip(columns[5::2], columns[6::2], strict=True)
    return all(
        left - _OUTSIDE <= px <= right + _OUTSIDE and top - _OUTSIDE <= py <= bottom + _OUTSIDE
        for px, py in points
        if (px, py) != (0, 0)
    )
