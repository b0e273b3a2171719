"""Place the phrases on the boxes of a picture so that they can be read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cogvlm_ft.colours import TARGET_COLOURS
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.html_page import text_width

NUM_COLOURS = len(TARGET_COLOURS)
_ENLARGED = 3.5
"""Approximate enlargement of a picture after a click."""
_HEIGHT, _FONT_PX = 17.0, 12.0
_MAX_CHARACTERS = 26
_MAX_OF_A_PHRASE = 2
"""Maximum number of labelled boxes per phrase before the picture is enlarged."""


@dataclass(frozen=True)
class Named:
    """A box in pixels of the picture, and its phrase. colour: below NUM_COLOURS."""

    box: Box
    phrase: str
    colour: int


@dataclass(frozen=True)
class Label:
    """x, y: of its corner in pixels of the picture. width, dx, dy: in pixels of the screen, as the text.

    only_large: there is no room for it while the picture is small.
    """

    text: str
    x: float
    y: float
    dx: float
    dy: float
    width: float
    colour: int
    only_large: bool


def place_labels(named: Sequence[Named], size_px: tuple[int, int], scale: float) -> list[Label]:
    """Label the large boxes first. A label that would cover another is left out: the colours tell the phrases.

    scale: how many pixels of the picture one pixel of the screen shows, before the picture is enlarged.
    """
    by_area = sorted(named, key=lambda each: (each.box[0] - each.box[2]) * (each.box[3] - each.box[1]))
    labels: list[Label] = []
    seen: Counter[str] = Counter()
    waiting: list[Named] = []
    for each in by_area:
        label = _label(each, size_px, scale, only_large=False)
        if seen[each.phrase] < _MAX_OF_A_PHRASE and not _covers(label, labels, scale):
            seen[each.phrase] += 1
            labels.append(label)
        else:
            waiting.append(each)
    for each in waiting:
        label = _label(each, size_px, scale / _ENLARGED, only_large=True)
        if not _covers(label, labels, scale / _ENLARGED):
            labels.append(label)
    return labels


def _label(named: Named, size_px: tuple[int, int], scale: float, *, only_large: bool) -> Label:
    """Put it above the top left corner, or inside the box at the top, or to the left at the right edge."""
    text = named.phrase if len(named.phrase) <= _MAX_CHARACTERS else f"{named.phrase[: _MAX_CHARACTERS - 1]}…"
    width = 8 + _FONT_PX * text_width(text)
    x, y = (min(max(edge, 0.0), float(side)) for edge, side in zip(named.box[:2], size_px, strict=True))
    dx = min(0.0, (size_px[0] - x) / scale - width)
    dx = max(dx, -x / scale)
    dy = -_HEIGHT if y >= _HEIGHT * scale else 0.0
    return Label(text, x, y, round(dx, 1), dy, width, named.colour, only_large)


def _covers(label: Label, others: Sequence[Label], scale: float) -> bool:
    a = _area(label, scale)
    areas = [_area(other, scale) for other in others]
    return any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in areas)


def _area(label: Label, scale: float) -> Box:
    x, y = label.x + label.dx * scale, label.y + label.dy * scale
    return x, y, x + label.width * scale, y + math.ceil(_HEIGHT * scale)
