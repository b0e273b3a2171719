"""Boxes as CogVLM writes them: `[[x0,y0,x1,y1]]`, thousandths of width and height in three digits, origin top left."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cogvlm_ft.grounding.targets import Box

NUM_BINS = 1000
Bins = tuple[int, int, int, int]

_GROUP = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_ITEM = re.compile(r"[0-9]{1,3}(?:,[0-9]{1,3}){3}")


def format_boxes(boxes_xyxy: Sequence[Box], image_size_px: tuple[int, int]) -> str:
    """Write boxes in pixels as one group, in the order given: `[[086,540,400,760;000,000,998,997]]`.

    image_size_px: (width, height).
    """
    assert boxes_xyxy, "there is no text for zero boxes: the not-found sentence of the wording stands for them"
    items = (",".join(f"{k:03d}" for k in bins_from_box(box, image_size_px)) for box in boxes_xyxy)
    return f"[[{';'.join(items)}]]"


def bins_from_box(box_xyxy: Box, image_size_px: tuple[int, int]) -> Bins:
    """Bins 0..999 of a box in pixels.

    The rule the model was trained with: clamp to the last pixel, divide by the size, round down. A full picture of
    640x480 is (0, 0, 998, 997).
    """
    width, height = image_size_px
    x0, y0, x1, y1 = box_xyxy
    return _bin(x0, width), _bin(y0, height), _bin(x1, width), _bin(y1, height)


def _bin(value_px: float, size_px: int) -> int:
    clamped_px = min(max(value_px, 0), size_px - 1)
    return min(math.floor(clamped_px / size_px * NUM_BINS), NUM_BINS - 1)


def parse_boxes(text: str) -> list[Bins] | None:
    """Bins of every `[[...]]` group of an answer, in order; None if there is no group or one of them is malformed.

    As strict as the official parser: digits and commas only, blanks are refused. Inverted boxes come back as they are.
    """
    closed = text[: text.rfind("]]") + 2]  # behind it, each of very many "[[" would be sought an end for
    items = [item for group in _GROUP.findall(closed) for item in group.split(";")]
    if not items or not all(_ITEM.fullmatch(item) for item in items):
        return None
    return [_parse_item(item) for item in items]


def _parse_item(item: str) -> Bins:
    x0, y0, x1, y1 = (int(number) for number in item.split(","))
    return x0, y0, x1, y1


def boxes_from_bins(bins: Sequence[Bins], image_size_px: tuple[int, int]) -> NDArray[np.float64]:
    """Boxes in pixels, float64[K, 4], each coordinate at the centre of its bin.

    Bins were rounded down, so the centre halves the error of the lower edge: it matters for small boxes.
    """
    width, height = image_size_px
    centres = (np.asarray(bins, dtype=np.float64).reshape(-1, 4) + 0.5) / NUM_BINS
    return centres * np.array([width, height, width, height], dtype=np.float64)
