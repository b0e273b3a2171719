"""Detect sources that write x, y, width, height where their format has the corners x0, y0, x1, y1."""

from __future__ import annotations

from dataclasses import dataclass

from cogvlm_ft.data.record import BOX_TOLERANCE_PX
from cogvlm_ft.grounding.targets import Box

_FEWEST, _MANY = 2, 0.3


@dataclass
class CornerEvidence:
    """Evidence from the boxes of known photos.

    num_inverted: boxes whose second corner is before the first one. are_sizes: all boxes are inside their photos if
    the last two numbers are width and height, as boxes in the right half never are if they are corners.
    """

    num_boxes: int = 0
    num_inverted: int = 0
    are_sizes: bool = True
    first: str = ""

    def add(self, box: Box, phrase: str, sizes: list[tuple[int, int]]) -> None:
        """Add a box; sizes: in the unit of the box, of which one is that of its photo."""
        if not sizes:
            return
        x, y, width, height = box
        self.num_boxes += 1
        if width < x or height < y:
            self.num_inverted += 1
            self.first = self.first or f"{phrase!r:.80} {[round(side, 4) for side in box]}"
        self.are_sizes &= min(x, y) >= -BOX_TOLERANCE_PX and any(
            x + width <= size[0] + BOX_TOLERANCE_PX and y + height <= size[1] + BOX_TOLERANCE_PX for size in sizes
        )

    def describe_sizes(self) -> str | None:
        """Return what is wrong if the boxes are sizes, with an example; None if they may be corners."""
        if not self.are_sizes or self.num_inverted < max(_FEWEST, _MANY * self.num_boxes):
            return None
        return (
            f"the boxes seem to be [x, y, width, height]: {self.num_inverted} of {self.num_boxes} are not possible as "
            f"corners, such as {self.first}, and all are inside their photos so; expected [x0, y0, x1, y1]. Convert "
            "them: x1 = x + width, y1 = y + height."
        )
