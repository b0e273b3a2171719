"""Detect sources whose boxes are written in another form than their format has, such as sizes in place of corners.

Some of such boxes leave their photos and are rejected, but the others are wrong boxes inside, so the source is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from cogvlm_ft.data.record import BOX_TOLERANCE_PX
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.packing.candidates import WrittenAs

_FEWEST, _MANY = 2, 0.3
_ROUNDING = 0.02  # of fractions


class _Reading(NamedTuple):
    """Another form that the numbers may have. box: the corners in this form of the numbers as written."""

    found: str
    box: Callable[[float, float, float, float], Box]
    advice: str


_EXPECTED = {
    "corners": "[x0, y0, x1, y1]",
    "sizes": "[x, y, width, height]",
    "centres": "the centre and the size: x y width height",
}
_EXCHANGED = _Reading("[y0, x0, y1, x1]", lambda a, b, c, d: (b, a, d, c), "Exchange x and y.")
_AS_CORNERS = _Reading(
    "[x0, y0, x1, y1]",
    lambda a, b, c, d: (a, b, c, d),
    "Convert them: width = x1 - x0, height = y1 - y0; in a table, name the columns left, top, right, bottom.",
)
_READINGS: dict[WrittenAs, tuple[_Reading, ...]] = {
    "corners": (
        _Reading(
            "[x, y, width, height]",
            lambda a, b, c, d: (a, b, a + c, b + d),
            "Convert them: x1 = x + width, y1 = y + height.",
        ),
        _EXCHANGED,
    ),
    "sizes": (_AS_CORNERS, _EXCHANGED._replace(found="[y, x, height, width]")),
    "centres": (
        _AS_CORNERS._replace(
            advice="Convert them: x = (x0 + x1) / 2, y = (y0 + y1) / 2, width = x1 - x0, height = y1 - y0."
        ),
        _Reading(
            "the upper left corner and the size",
            lambda a, b, c, d: (a, b, a + c, b + d),
            "Convert them: x = left + width / 2, y = top + height / 2.",
        ),
    ),
}


@dataclass
class FormEvidence:
    """Evidence from the boxes of known photos that are written in one form.

    num_wrong: boxes that leave their photos, or whose second corner is before the first one. fits: how many boxes are
    inside their photos in each other form.
    """

    written_as: WrittenAs
    num_boxes: int = 0
    num_wrong: int = 0
    fits: Counter[str] = field(default_factory=Counter)
    first: str = ""

    def add(self, box: Box, phrase: str, sizes: list[tuple[int, int]]) -> None:
        """Add a box; sizes: in the unit of the box, of which one is that of its photo."""
        if not sizes:
            return
        numbers = self._as_written(box)
        self.num_boxes += 1
        if not _is_inside(box, sizes):
            self.num_wrong += 1
            self.first = self.first or f"{phrase!r:.80} {[round(number, 4) for number in numbers]}"
        for reading in _READINGS[self.written_as]:
            self.fits[reading.found] += _is_inside(reading.box(*numbers), sizes)

    def describe(self, *, exchanged: bool) -> str | None:
        """Return what is wrong if the boxes only fit in another form, with an example; None if they may be right.

        exchanged: in the form with x and y exchanged, else in all others.
        """
        if self.num_wrong < max(_FEWEST, _MANY * self.num_boxes):
            return None
        readings = (one for one in _READINGS[self.written_as] if (one.advice == _EXCHANGED.advice) == exchanged)
        reading = next((one for one in readings if self.fits[one.found] == self.num_boxes), None)
        if reading is None:
            return None
        return (
            f"the boxes seem to be {reading.found}: {self.num_wrong} of {self.num_boxes} are not possible as "
            f"{self.written_as}, such as {self.first}, and all are inside their photos so; expected "
            f"{_EXPECTED[self.written_as]}. {reading.advice}"
        )

    def _as_written(self, box: Box) -> Box:
        x0, y0, x1, y1 = box
        if self.written_as == "corners":
            return box
        width, height = x1 - x0, y1 - y0
        return (x0, y0, width, height) if self.written_as == "sizes" else ((x0 + x1) / 2, (y0 + y1) / 2, width, height)


def _is_inside(box: Box, sizes: list[tuple[int, int]]) -> bool:
    x0, y0, x1, y1 = box
    if x1 < x0 or y1 < y0:
        return False
    return any(
        min(x0, y0) >= -(rounding := BOX_TOLERANCE_PX if max(size) > 1 else _ROUNDING)
        and x1 <= size[0] + rounding
        and y1 <= size[1] + rounding
        for size in sizes
    )
