"""Scoring protocols of other models and benchmarks, for comparable numbers.

Other models write boxes in other forms. Every protocol first looks for the form of its authors; an answer without it is
read as this model's `[[...]]`, by the authors' rules for everything else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cogvlm_ft.grounding.boxes import Bins, bins_from_box, boxes_from_bins, parse_boxes
from cogvlm_ft.grounding.overlap import enclosing_box
from cogvlm_ft.grounding.targets import Box

Size = tuple[int, int]

_GROUP = re.compile(r"\[\[(.*?)\]\]")
_TWO_CORNERS = re.compile(r"\((.*?)\),\((.*?)\)")
_BRACKETS = re.compile(r"\[+([^\[\]]*)\]+")


@dataclass(frozen=True)
class Protocol:
    """One way to score.

    read: an answer and the (width, height) it is about -> boxes in those pixels; None = unreadable, which is IoU 0.
    truth: the true boxes that these are compared with, in pixels too.
    strict: a hit needs more than the threshold, not only as much.
    every_box: all boxes of the answer are read, so that sets of them can be scored.
    one_box: questions with several true boxes are left out; those about absent targets are not.
    """

    name: str
    read: Callable[[str, Size], list[Box] | None]
    truth: Callable[[Sequence[Box], Size], list[Box]]
    strict: bool = False
    every_box: bool = False
    one_box: bool = False

    def takes(self, truth_boxes_xyxy: Sequence[Box] | None) -> bool:
        """Return whether a question with these true boxes is scored."""
        return not (self.one_box and truth_boxes_xyxy and len(truth_boxes_xyxy) > 1)


def read_bin_centres(text: str, size_px: Size) -> list[Box] | None:
    """Read every box of the answer, each coordinate at the centre of its bin: (k + 0.5) / 1000."""
    bins = parse_boxes(text)
    return None if bins is None else _in_pixels(bins, size_px, "centre")


def read_bin_edges(text: str, size_px: Size) -> list[Box] | None:
    """Read every box of the answer, each coordinate at the lower edge of its bin: k / 1000."""
    bins = parse_boxes(text)
    return None if bins is None else _in_pixels(bins, size_px, "official")


def _in_pixels(bins: Sequence[Bins], size_px: Size, reading: str) -> list[Box]:
    return [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes_from_bins(bins, size_px, reading).tolist()]


def first_group(text: str) -> Box | None:
    """Return the box around all boxes of the first `[[...]]`, in thousandths; digits and commas only.

    The evaluation of CogVLM's authors reads both the answer and the label this way.
    """
    match = _GROUP.search(_closed(text))
    if match is None:
        return None
    items = [item.split(",") for item in match[1].split(";")]
    boxes = [[int(number) for number in item] for item in items if len(item) == 4 and all(map(str.isdecimal, item))]
    return enclosing_box(boxes) if boxes else None


def _read_first_group(text: str, size_px: Size) -> list[Box] | None:
    box = first_group(text)
    return None if box is None else [_scaled(box, size_px)]


def _quantised_truth(boxes: Sequence[Box], size_px: Size) -> list[Box]:
    """Return the label as it reads from its own text: in thousandths, one box around all."""
    return [_scaled(enclosing_box([bins_from_box(box, size_px) for box in boxes]), size_px)] if boxes else []


def _read_two_corners(text: str, size_px: Size) -> list[Box] | None:
    """Read the first `(x0,y0),(x1,y1)`, in 1/999."""
    match = _TWO_CORNERS.search(text)
    corners = [corner.split(",") for corner in match.groups()] if match else []
    if any(len(corner) != 2 for corner in corners):
        return None
    numbers = _numbers([word for corner in corners for word in corner]) if corners else _first_of_own(text)
    return None if numbers is None else [_scaled(numbers, size_px, 999)]


def _read_four_numbers(text: str, size_px: Size) -> list[Box] | None:
    """Read the first `[a,b,c,d]`; thousandths if the numbers add up to 4 or more, else fractions."""
    words = text.partition("[")[2].lstrip("[").split(",", 3)
    numbers = _numbers([*words[:3], words[3].partition("]")[0]]) if len(words) == 4 and "]" in words[3] else None
    return None if numbers is None else [_scaled(numbers, size_px, 1000 if sum(numbers) >= 4 else 1)]


def _read_the_only_box(text: str, size_px: Size) -> list[Box] | None:
    """Read a single bracket with one box, in fractions or this model's thousandths; None otherwise."""
    found = _BRACKETS.findall(_closed(text, "]"))
    numbers = _numbers(found[0].split(",")) if len(found) == 1 else None
    return None if numbers is None else [_scaled(numbers, size_px, 1 if max(numbers) <= 1 else 1000)]


def _first_of_own(text: str) -> list[float] | None:
    match = _GROUP.search(_closed(text))
    return _numbers(match[1].split(";")[0].split(",")) if match else None


def _closed(text: str, end: str = "]]") -> str:
    """Cut the text after its last bracket; beyond it, the search for an end would take quadratic time."""
    return text[: text.rfind(end) + len(end)] if end in text else ""


def _numbers(words: Sequence[str]) -> list[float] | None:
    """Parse four finite numbers, or return None."""
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        return None
    return numbers if len(numbers) == 4 and all(map(math.isfinite, numbers)) else None


def _scaled(numbers: Sequence[float], size_px: Size, parts: int = 1000) -> Box:
    width, height = size_px
    x0, y0, x1, y1 = numbers
    return x0 / parts * width, y0 / parts * height, x1 / parts * width, y1 / parts * height


def _exact_truth(boxes: Sequence[Box], size_px: Size) -> list[Box]:
    return list(boxes)


OURS = Protocol("ours", read_bin_centres, _exact_truth, every_box=True)
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        OURS,
        Protocol("cogvlm_authors", _read_first_group, _quantised_truth, strict=True),
        Protocol("qwen_vl", _read_two_corners, _exact_truth, one_box=True),
        Protocol("internvl", _read_four_numbers, _exact_truth, one_box=True),
        Protocol("shikra", _read_the_only_box, _exact_truth, strict=True, one_box=True),
        Protocol("grec_official", read_bin_edges, _exact_truth, every_box=True),
    )
}
