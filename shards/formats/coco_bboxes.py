"""Detect COCO files whose bbox is [x0, y0, x1, y1], as some converters write it, in place of [x, y, width, height]."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from cogvlm_ft.data.record import is_finite_number
from cogvlm_ft.errors import DataError

_TOLERANCE_PX = 1.0
_TOLERANCE_OF_AREA = 0.01
_FEWEST = 3
_MANY, _NEARLY_ALL, _MANY_OUTSIDE = 20, 0.95, 0.1
_SIZES = 1
"""bbox_mode of Detectron2 for x, y, width, height in pixels."""


class Bbox(NamedTuple):
    """A bbox as written. size_px: of its photo, if stated; area and mode: fields of the annotation."""

    numbers: tuple[float, ...]
    size_px: tuple[int, int] | None
    area: Any
    mode: Any


def check_sizes(bboxes: Iterable[Bbox], path: Path) -> None:
    """Raise DataError if the boxes of the file can only be corners.

    That is certain if their areas say so, or if as sizes boxes leave their photos that as corners are all inside.
    """
    num_sized = num_corners = num_outside = num_areas = num_areas_of_corners = 0
    first: Bbox | None = None
    for bbox in bboxes:
        if bbox.mode not in (None, _SIZES):
            raise DataError(
                f"{path}: bbox_mode {bbox.mode!r:.20}; expected [x, y, width, height] in pixels, which is {_SIZES}. "
                "Convert the boxes."
            )
        x, y, right, bottom = bbox.numbers
        area = bbox.area if is_finite_number(bbox.area) and bbox.area > 0 else None
        if area is not None and not _is_near(right * bottom, (right - x) * (bottom - y)):
            num_areas += 1
            num_areas_of_corners += right > x and bottom > y and _is_near(area, (right - x) * (bottom - y))
        if bbox.size_px is None:
            continue
        width, height = bbox.size_px[0] + _TOLERANCE_PX, bbox.size_px[1] + _TOLERANCE_PX
        num_sized += 1
        num_corners += x < right <= width and y < bottom <= height
        if x + right > width or y + bottom > height:
            num_outside += 1
            first = first or bbox
    are_corners = num_sized >= _FEWEST and num_corners == num_sized and num_outside > 0
    are_mostly = num_sized >= _MANY and num_corners >= _NEARLY_ALL * num_sized
    if are_corners or (are_mostly and num_outside >= _MANY_OUTSIDE * num_sized):
        detail = (
            f"{num_outside} of {num_sized} boxes leave their photos, such as {list(first.numbers) if first else ''}"
        )
        raise _corners(path, f"{detail}, but as corners {num_corners} are inside")
    if num_areas and num_areas_of_corners == num_areas:
        raise _corners(path, f'the "area" of {num_areas} boxes is (x1 - x0) * (y1 - y0)')


def _corners(path: Path, found: str) -> DataError:
    return DataError(
        f"{path}: every bbox seems to be [x0, y0, x1, y1]: {found}; expected [x, y, width, height]. "
        "Write x1 - x0 and y1 - y0 as width and height."
    )


def _is_near(area: float, other: float) -> bool:
    return math.isclose(area, other, rel_tol=_TOLERANCE_OF_AREA)
