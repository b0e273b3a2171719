"""Detect COCO files whose bbox is [x0, y0, x1, y1], as some converters write it, in place of [x, y, width, height]."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cogvlm_ft.data.record import is_finite_number
from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Box

_TOLERANCE_PX = 1.0
_TOLERANCE_OF_AREA = 0.01
_TOLERANCE_OF_OUTLINE = 0.02
_FEWEST = 3
_FEWEST_OUTSIDE, _LARGE_PART = 2, 0.3
_MANY, _NEARLY_ALL, _MANY_OUTSIDE = 20, 0.95, 0.1
SIZES, CORNERS = "coco-xywh", "coco-xyxy"
"""Values of --format that state what the numbers of a bbox mean."""
_SIZES = 1
"""bbox_mode of Detectron2 for x, y, width, height in pixels."""


class Bbox(NamedTuple):
    """A bbox as written.

    size_px: of its photo, if stated; area and mode: fields of the annotation; outline: the box around its outline.
    """

    numbers: tuple[float, ...]
    size_px: tuple[int, int] | None
    area: Any
    mode: Any
    outline: Box | None = None


@dataclass
class _Counts:
    """How many boxes of a file fit which reading.

    sized: boxes whose photo states its size. corners: of these, possible as corners inside it. outside: of these,
    outside it as sizes; first: the first of them. areas: boxes whose "area" fits only one reading at most. outlines:
    boxes whose outline fits only one reading.
    """

    sized: int = 0
    corners: int = 0
    outside: int = 0
    areas: int = 0
    areas_of_sizes: int = 0
    areas_of_corners: int = 0
    outlines: int = 0
    outlines_of_corners: int = 0
    first: Bbox | None = None

    def add(self, bbox: Bbox) -> None:
        x, y, right, bottom = bbox.numbers
        area = bbox.area if is_finite_number(bbox.area) and bbox.area > 0 else None
        if area is not None and not _is_near(right * bottom, (right - x) * (bottom - y)):
            self.areas += 1
            self.areas_of_sizes += _is_near(area, right * bottom)
            self.areas_of_corners += right > x and bottom > y and _is_near(area, (right - x) * (bottom - y))
        if bbox.outline is not None:
            is_size, is_corners = (
                _are_near(box, bbox.outline) for box in ((x, y, x + right, y + bottom), bbox.numbers)
            )
            self.outlines += is_size != is_corners
            self.outlines_of_corners += is_corners and not is_size
        if bbox.size_px is None:
            return
        width, height = bbox.size_px[0] + _TOLERANCE_PX, bbox.size_px[1] + _TOLERANCE_PX
        self.sized += 1
        self.corners += x < right <= width and y < bottom <= height
        if x + right > width or y + bottom > height:
            self.outside += 1
            self.first = self.first or bbox

    @property
    def are_corners(self) -> bool:
        """Return whether the boxes can only be corners; one that leaves its photo as a size may be a mistake."""
        many = self.outside >= max(_FEWEST_OUTSIDE, _LARGE_PART * self.sized)
        are_all = self.sized >= _FEWEST and self.corners == self.sized and many
        are_mostly = self.sized >= _MANY and self.corners >= _NEARLY_ALL * self.sized
        return are_all or (are_mostly and self.outside >= _MANY_OUTSIDE * self.sized)

    @property
    def may_be_corners(self) -> bool:
        """Return whether both readings are possible, and neither the areas nor the number of boxes decide."""
        are_sizes = self.areas > 0 and self.areas_of_sizes == self.areas
        few = self.sized >= _MANY and self.outside <= (1 - _NEARLY_ALL) * self.sized
        are_possible = self.sized >= _FEWEST and self.corners == self.sized and self.outside > 0
        return are_possible and not (are_sizes or few)


def check_sizes(bboxes: Iterable[Bbox], path: Path, *, is_stated: bool = False) -> None:
    """Raise DataError if the boxes of the file can only be corners, or may be.

    Their areas say so, or as sizes boxes leave their photos that as corners are all inside. is_stated: the user says
    that they are sizes.
    """
    counts = _Counts()
    for bbox in bboxes:
        if bbox.mode not in (None, _SIZES):
            raise DataError(
                f"{path}: bbox_mode {bbox.mode!r:.20}; expected [x, y, width, height] in pixels, which is {_SIZES}. "
                f"Convert the boxes, or add --format {CORNERS} if they are [x0, y0, x1, y1]."
            )
        counts.add(bbox)
    if is_stated:
        return
    shown = list(counts.first.numbers) if counts.first else ""
    outside = f"{counts.outside} of {counts.sized} boxes leave their photos, such as {shown}, but as corners"
    if counts.are_corners:
        raise _corners(path, f"{outside} {counts.corners} are inside")
    if counts.areas and counts.areas_of_corners == counts.areas:
        raise _corners(path, f'the "area" of {counts.areas} boxes is (x1 - x0) * (y1 - y0)')
    if counts.outlines and counts.outlines_of_corners == counts.outlines:
        raise _corners(path, f"the outlines of {counts.outlines} boxes are in them as corners")
    if counts.may_be_corners:
        raise DataError(
            f"{path}: every bbox may be [x, y, width, height] or [x0, y0, x1, y1]: as sizes {outside} all are inside; "
            f"expected one reading. Add --format {SIZES} if they are sizes, and the boxes outside are rejected, or "
            f"--format {CORNERS} if they are corners."
        )


def as_size(bbox: Sequence[float]) -> list[float]:
    """Return [x, y, width, height] of [x0, y0, x1, y1]."""
    x0, y0, x1, y1 = bbox
    return [x0, y0, x1 - x0, y1 - y0]


def _corners(path: Path, found: str) -> DataError:
    return DataError(
        f"{path}: every bbox seems to be [x0, y0, x1, y1]: {found}; expected [x, y, width, height]. "
        f"Add --format {CORNERS} to read them so, or --format {SIZES} if they are sizes after all."
    )


def _are_near(box: Sequence[float], outline: Box) -> bool:
    tolerance = _TOLERANCE_OF_OUTLINE * max(outline[2] - outline[0], outline[3] - outline[1]) + _TOLERANCE_PX
    return all(abs(side - other) <= tolerance for side, other in zip(box, outline, strict=True))


def _is_near(area: float, other: float) -> bool:
    return math.isclose(area, other, rel_tol=_TOLERANCE_OF_AREA)
