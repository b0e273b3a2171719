"""Tiles: the overlapping parts in which a large photo is shown, and what is visible of a box in each of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cogvlm_ft.grounding.targets import Box

Window = tuple[int, int, int, int]
"""(x0, y0, x1, y1) in whole pixels of the photo."""


def tile_windows(size_px: tuple[int, int], side_px: int, overlap: float) -> list[Window]:
    """Return the tiles of a photo, row by row; the photo itself is the only one if it is not larger than a tile.

    Together they cover every pixel. Neighbours overlap by at least `overlap * side_px` (rounded up), evenly spread, so
    that whatever is not longer than that is whole in some tile. No tile exceeds the photo.
    """
    columns, rows = (_intervals(length, side_px, overlap) for length in size_px)
    return [(x0, y0, x1, y1) for y0, y1 in rows for x0, x1 in columns]


def _intervals(length: int, side: int, overlap: float) -> list[tuple[int, int]]:
    if length <= side:
        return [(0, length)]
    step = max(1, int(side * (1 - overlap)))
    last = -(-(length - side) // step)
    starts = [number * (length - side) // last for number in range(last + 1)]
    return [(start, start + side) for start in starts]


def visible_fractions(boxes_xyxy: ArrayLike, windows: Sequence[Window]) -> NDArray[np.float64]:
    """Return the fraction of each box's area that is inside each window, float64[windows, boxes]."""
    boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(1, -1, 4)
    frames = np.asarray(windows, dtype=np.float64).reshape(-1, 1, 4)
    inside = np.clip(np.minimum(boxes[..., 2:], frames[..., 2:]) - np.maximum(boxes[..., :2], frames[..., :2]), 0, None)
    sides = boxes[..., 2:] - boxes[..., :2]
    areas = np.broadcast_to(sides.prod(-1), inside.shape[:-1])
    return np.divide(inside.prod(-1), areas, out=np.zeros(areas.shape), where=areas > 0)


def clip_to_window(box: Box, window: Window) -> Box:
    """Return the part of a box inside a window, in pixels of the photo."""
    x0, y0, x1, y1 = window
    return max(box[0], x0), max(box[1], y0), min(box[2], x1), min(box[3], y1)


def is_cut(box: Box, window: Window, size_px: tuple[int, int], margin_px: float = 1.0) -> bool:
    """Return whether a box ends at an edge of the window that is not an edge of the photo, so it may go on beyond."""
    return bool(
        (window[0] > 0 and box[0] < window[0] + margin_px)
        or (window[1] > 0 and box[1] < window[1] + margin_px)
        or (window[2] < size_px[0] and box[2] > window[2] - margin_px)
        or (window[3] < size_px[1] and box[3] > window[3] - margin_px)
    )
