"""Box text as CogVLM writes it: `[[x0,y0,x1,y1]]`, thousandths of width and height in three digits, origin top left."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cogvlm_ft.grounding.targets import Box

NUM_BINS = 1000
Bins = tuple[int, int, int, int]

READINGS = ("centre", "official")

_GROUP = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_ITEM = re.compile(r"[0-9]{1,3}(?:,[0-9]{1,3}){3}")
_NUMBER = re.compile(r"[0-9]+")
_REACH = 20  # bins


def format_boxes(boxes_xyxy: Sequence[Box], image_size_px: tuple[int, int]) -> str:
    """Format boxes in pixels as one group, in the given order: `[[086,540,400,760;000,000,998,997]]`.

    image_size_px: (width, height).
    """
    assert boxes_xyxy, "no boxes to format: use the not-found sentence of the wording"
    items = (",".join(f"{k:03d}" for k in bins_from_box(box, image_size_px)) for box in boxes_xyxy)
    return f"[[{';'.join(items)}]]"


def bins_from_box(box_xyxy: Box, image_size_px: tuple[int, int]) -> Bins:
    """Return the bins, 0 to 999, of a box in pixels.

    The rule the model was trained with: clamp to the last pixel, divide by the size, round down. The full area of a
    640x480 image is (0, 0, 998, 997).
    """
    width, height = image_size_px
    x0, y0, x1, y1 = box_xyxy
    return _bin(x0, width), _bin(y0, height), _bin(x1, width), _bin(y1, height)


def _bin(value_px: float, size_px: int) -> int:
    clamped_px = min(max(value_px, 0), size_px - 1)
    return min(math.floor(clamped_px / size_px * NUM_BINS), NUM_BINS - 1)


def parse_boxes(text: str) -> list[Bins] | None:
    """Parse every `[[...]]` group of an answer into bins, in order; None without a group or if one is malformed.

    As strict as the official parser: digits and commas only, no blanks. Inverted boxes are returned as they are.
    """
    closed = text[: text.rfind("]]") + 2]  # after it, the search for an end would take quadratic time
    items = [item for group in _GROUP.findall(closed) for item in group.split(";")]
    if not items or not all(_ITEM.fullmatch(item) for item in items):
        return None
    return [_parse_item(item) for item in items]


def close_cut_list(text: str) -> str:
    """Return an answer that was cut at its token limit with its last list of boxes closed.

    A box followed by `;` or `]` stays. The one after it is dropped: its last number may lack digits.
    """
    start = text.rfind("[[")
    listed = text[start + 2 :]
    if start < 0 or "]]" in listed:
        return text
    kept = listed[:-1] if listed.endswith("]") else listed.rpartition(";")[0]
    return f"{text[:start]}[[{kept}]]" if kept else text[:start]


def _parse_item(item: str) -> Bins:
    x0, y0, x1, y1 = (int(number) for number in item.split(","))
    return x0, y0, x1, y1


def boxes_from_bins(
    bins: Sequence[tuple[float, float, float, float]], image_size_px: tuple[int, int], reading: str = "centre"
) -> NDArray[np.float64]:
    """Return boxes in pixels, float64[K, 4].

    reading: "centre" places each coordinate at the centre of its bin. Bins are rounded down, so this halves the error
    of "official", which places it at the lower edge as the reference does: there, 41 % of perfect answers about targets
    3 bins wide miss IoU 0.5.
    """
    assert reading in READINGS, reading
    width, height = image_size_px
    offset = 0.5 if reading == "centre" else 0.0
    units = (np.asarray(bins, dtype=np.float64).reshape(-1, 4) + offset) / NUM_BINS
    return units * np.array([width, height, width, height], dtype=np.float64)


@dataclass(frozen=True)
class ReadBox:
    """One box of an answer. confidence: mean probability of its digits.

    expected: like `bins`, but fractional: the mean of each coordinate under the probabilities of its digits.
    """

    bins: Bins
    confidence: float
    expected: tuple[float, float, float, float]


def read_boxes(text: str, digit_probs: Sequence[Sequence[float]]) -> list[ReadBox] | None:
    """Return the boxes that `parse_boxes` finds, with the probabilities of their digits.

    digit_probs: for every digit of the text, in order, the probabilities of 0 to 9. None if their number differs from
    the digits of the text, as with a tokenizer that writes several digits as one token, or if the text is unreadable.
    """
    places = [place for place, character in enumerate(text) if character in "0123456789"]
    if parse_boxes(text) is None or len(places) != len(digit_probs):
        return None
    probs_at = dict(zip(places, digit_probs, strict=True))
    groups = [group.span(1) for group in _GROUP.finditer(text[: text.rfind("]]") + 2])]
    return [_read_box(item, probs_at) for start, stop in groups for item in _ITEM.finditer(text, start, stop)]


def _read_box(item: re.Match[str], probs_at: dict[int, Sequence[float]]) -> ReadBox:
    text, numbers = item.string, [range(*number.span()) for number in _NUMBER.finditer(item.string, *item.span())]
    chosen = [probs_at[place][int(text[place])] for number in numbers for place in number]
    x0, y0, x1, y1 = (
        expected_coordinate(text[number.start : number.stop], [probs_at[place] for place in number])
        for number in numbers
    )
    return ReadBox(_parse_item(item[0]), sum(chosen) / len(chosen), (x0, y0, x1, y1))


def expected_coordinate(digits: str, digit_probs: Sequence[Sequence[float]]) -> float:
    """Return the mean of a number written digit by digit, under the probabilities of each digit.

    The digits after an alternative digit are not known, so the number next to the written one is used: for 299 with an
    alternative 3 for the 2, that is 300. Otherwise the mean of two neighbours could be 349. Numbers more than _REACH
    away are left out: they belong to another object, not to this edge.
    """
    value, shift, weight, prob_of_prefix = int(digits), 0.0, 0.0, 1.0
    for i, (digit, row) in enumerate(zip(digits, digit_probs, strict=True)):
        total = sum(row) or 1.0
        for other, prob in enumerate(row):
            if other != int(digit):
                rest = ("0" if other > int(digit) else "9") * (len(digits) - i - 1)
                distance = int(f"{digits[:i]}{other}{rest}") - value
                if abs(distance) <= _REACH:
                    shift += prob_of_prefix * prob / total * distance
                    weight += prob_of_prefix * prob / total
        prob_of_prefix *= row[int(digit)] / total
    return value + shift / ((weight + prob_of_prefix) or 1.0)
