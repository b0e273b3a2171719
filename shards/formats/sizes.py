"""Read the image size that an annotation states, and fit shapes to it."""

from __future__ import annotations

import math
from typing import Any

from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.packing.candidates import Problem, shown

SizePx = tuple[int, int]

_NOT_STATED = (None, "", 0)


def stated_size(width: Any, height: Any, source: str) -> tuple[SizePx | None, tuple[Problem, ...]]:
    """Return (width, height) in pixels, or None if missing or 0, which some tools write; and a note if unreadable.

    Numbers may be text or have decimals that are zero: "50.0".
    """
    sides = [_side(side.strip() if isinstance(side, str) else side) for side in (width, height)]
    if math.nan in sides:
        detail = f"the stated image size is {shown([width, height])}; expected two whole numbers. It was not compared."
        return None, (Problem("note", "unreadable_size", detail, source),)
    if 0 in sides:
        return None, ()
    return (int(sides[0]), int(sides[1])), ()


def _side(value: Any) -> float:
    """Return the number of pixels, 0 if it is not stated, or math.nan, itself, for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str, type(None))):
        return math.nan
    if value in _NOT_STATED:
        return 0
    try:
        side = float(value or 0)
    except (ValueError, OverflowError):
        return math.nan
    return side if side >= 0 and side.is_integer() else math.nan


def clip_to_size(box: Box, size_px: SizePx | None) -> Box:
    """Return the part of the box inside the image, for shapes that may reach over its edge; all of it if none is."""
    if size_px is None:
        return box
    x0, y0 = max(box[0], 0.0), max(box[1], 0.0)
    x1, y1 = min(box[2], float(size_px[0])), min(box[3], float(size_px[1]))
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else box
