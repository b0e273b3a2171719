"""Choose the photos of the galleries in the pass over the source: at random, and those with the most extreme boxes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from heapq import nsmallest
from typing import NamedTuple

from cogvlm_ft.data.record import box_defect, clip_box
from cogvlm_ft.shards.reviewing.photos import Photo
from cogvlm_ft.shards.reviewing.readings import boxes_of, in_pixels
from cogvlm_ft.shards.reviewing.sources import Item

NUM_RANDOM, NUM_EXTREME = 24, 8


@dataclass(frozen=True)
class Measure:
    """The values that decide whether a photo is in a gallery.

    position: of its candidate in the part of the source that is examined at once. part: its id.
    num_boxes: those that fit the photo. smallest, largest: of them, the root of the fraction of the photo's area.
    """

    position: int
    part: str
    num_boxes: int
    smallest: float
    largest: float

    @property
    def draw(self) -> float:
        """Return the position in a random order with a fixed seed. Input order and process count do not matter."""
        return int.from_bytes(blake2b(f"gallery {self.part}".encode(), digest_size=6).digest(), "big")


def measure_photo(position: int, item: Item, photo: Photo) -> Measure:
    """Measure the boxes that fit the photo."""
    width, height = photo.size_px
    sides = []
    for box in in_pixels(boxes_of(item.candidate), item.candidate.units, photo.size_px).tolist():
        if box_defect(box, photo.size_px) is None:
            x0, y0, x1, y1 = clip_box(box, photo.size_px)
            sides.append(math.sqrt((x1 - x0) * (y1 - y0) / (width * height)))
    return Measure(position, item.ids.sample, len(sides), min(sides, default=0.0), max(sides, default=0.0))


class _Rule(NamedTuple):
    """rank: lower is chosen first. belongs: whether a photo may be in the gallery."""

    size: int
    rank: Callable[[Measure], float]
    belongs: Callable[[Measure], bool]


GALLERIES: dict[str, _Rule] = {
    "random": _Rule(NUM_RANDOM, lambda measure: measure.draw, lambda measure: True),
    "crowded": _Rule(NUM_EXTREME, lambda measure: -measure.num_boxes, lambda measure: measure.num_boxes > 1),
    "smallest": _Rule(NUM_EXTREME, lambda measure: measure.smallest, lambda measure: measure.num_boxes > 0),
    "largest": _Rule(NUM_EXTREME, lambda measure: -measure.largest, lambda measure: measure.num_boxes > 0),
}
"""Galleries in the order of the page."""

_Entry = tuple[float, float, int, Item]
"""(rank, random order, arrival, candidate)"""


class Galleries:
    """The photos chosen so far; memory does not grow with the source."""

    def __init__(self) -> None:
        self._entries: dict[str, list[_Entry]] = {name: [] for name in GALLERIES}
        self._last: dict[str, float] = dict.fromkeys(GALLERIES, math.inf)
        self._arrived = 0

    def add(self, measure: Measure, item: Item) -> None:
        self._arrived += 1
        for name, rule in GALLERIES.items():
            if rule.belongs(measure) and rule.rank(measure) <= self._last[name]:
                entries = self._entries[name]
                entries.append((rule.rank(measure), measure.draw, self._arrived, item))
                if len(entries) >= 2 * rule.size:
                    entries[:] = nsmallest(rule.size, entries, key=lambda entry: entry[:3])
                    self._last[name] = entries[-1][0]

    def chosen(self) -> dict[str, list[Item]]:
        """Return the candidates of each gallery, the most extreme first."""
        return {
            name: [entry[3] for entry in nsmallest(rule.size, self._entries[name], key=lambda entry: entry[:3])]
            for name, rule in GALLERIES.items()
        }
