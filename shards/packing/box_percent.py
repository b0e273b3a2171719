"""Detect boxes in percent of the photo, as Label Studio has them, where pixels are expected."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from cogvlm_ft.shards.packing.candidates import Box, Candidate

_CERTAIN = math.log(10**6)
_FAR = 50


@dataclass
class PercentEvidence:
    """Evidence that boxes in pixels are percent of their photos: all are near the upper left corner of large ones.

    log_odds: how likely that is in pixels, where boxes may be anywhere. counted: the boxes that it is about; the same
        box in another photo, such as that of a logo, says nothing new. reach: the highest x1 and y1. largest: of the
        photos.
    """

    are_possible: bool = True
    num_boxes: int = 0
    log_odds: float = 0.0
    counted: set[Box] = field(default_factory=set)
    reach: tuple[float, float] = (0.0, 0.0)
    largest: tuple[int, int] = (0, 0)

    def add(self, candidate: Candidate, sizes: list[tuple[int, int]]) -> None:
        """Add the boxes of an image; sizes: as of `Evidence.add`."""
        boxes = [box for target in candidate.targets for box in target.boxes_xyxy]
        self.are_possible &= all(min(box) >= 0 and max(box) <= 100 for box in boxes)
        if not (sizes and self.are_possible):
            return
        self.num_boxes += len(boxes)
        if self.log_odds > -_CERTAIN and not self.counted.issuperset(boxes):
            self.log_odds += sum(min(0.0, math.log(100 / side)) for side in sizes[0])  # boxes of a photo may be close
            self.counted.update(boxes)
        self.reach = max(self.reach[0], *(box[2] for box in boxes)), max(self.reach[1], *(box[3] for box in boxes))
        self.largest = max(self.largest, sizes[0])

    def describe(self) -> str | None:
        """Return what is wrong if the boxes are hardly pixels; None if they may be."""
        if not self.are_possible or self.log_odds > -_CERTAIN or min(self.reach) < _FAR:
            return None
        return (
            f"all {self.num_boxes} boxes are in the first 100 pixels of photos of up to {self.largest[0]} x "
            f"{self.largest[1]} pixels, as percent of the photo would be; expected pixels. Multiply them by width / "
            "100 and height / 100, or add --box-unit pixel if they are pixels."
        )
