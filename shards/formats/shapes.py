"""Boxes around shapes that are not upright rectangles."""

from __future__ import annotations

import math
from collections.abc import Iterable

from cogvlm_ft.grounding.targets import Box


def box_around(points: Iterable[tuple[float, float]]) -> Box:
    """Return the box around at least one point."""
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def box_around_ellipse(center: tuple[float, float], radii: tuple[float, float], degrees: float = 0.0) -> Box:
    """Return the box around an ellipse that is rotated clockwise around its center."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    half_width, half_height = (
        math.hypot(radii[0] * cosine, radii[1] * sine),
        math.hypot(radii[0] * sine, radii[1] * cosine),
    )
    return center[0] - half_width, center[1] - half_height, center[0] + half_width, center[1] + half_height


def box_around_rotated(box: Box, degrees: float, pivot: tuple[float, float]) -> Box:
    """Return the upright box around a box that is rotated clockwise around a point."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x0, y0, x1, y1 = box
    offsets = [(x - pivot[0], y - pivot[1]) for x in (x0, x1) for y in (y0, y1)]
    return box_around((pivot[0] + x * cosine - y * sine, pivot[1] + x * sine + y * cosine) for x, y in offsets)
