"""Check whether another interpretation of the numbers fits all boxes of a source better.

Corners or width and height, x or y first, pixels or fractions of the image: a wrong choice affects many boxes at once:
they are inverted, outside their images, or smaller than a pixel. Another reading is reported if nearly all boxes fit
it. A reading that fits is never questioned because another fits as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cogvlm_ft.data.record import BOX_TOLERANCE_PX
from cogvlm_ft.shards.packing.candidates import Candidate

Boxes = NDArray[np.float64]
Tally = Counter[tuple[Any, ...]]

MIN_BAD_BOXES, MIN_BAD_SHARE = 3, 0.1
MIN_FIT_SHARE = 0.95
"""A reading is reported if this fraction of boxes does not fit as read, and this fraction does in the other reading."""

_SAME_SHARE = 0.02  # readings that differ by less are equally good: such differences are errors and chance
_FAR_PX = 1200
_MIN_FAR_BOXES = 30


class Reading(NamedTuple):
    """scale: "pixels", "unit" or "thousandths"; layout: a key of LAYOUTS."""

    scale: str
    layout: str

    def __str__(self) -> str:
        return f"{_LAYOUT_WORDS[self.layout]}, {_SCALE_WORDS[self.scale]}"


LAYOUTS: dict[str, Callable[[Boxes], Boxes]] = {
    "xyxy": lambda boxes: boxes,
    "xywh": lambda boxes: np.column_stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]),
    "yxyx": lambda boxes: boxes[:, [1, 0, 3, 2]],
    "corners": lambda boxes: np.column_stack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]),
}
"""What four numbers may mean. "corners": x0, y0, x1, y1 that a reader took for x, y, w, h."""

_SCALES = ("pixels", "unit", "thousandths")
_LAYOUT_WORDS = {
    "xyxy": "x0,y0,x1,y1",
    "xywh": "x,y,w,h",
    "yxyx": "y0,x0,y1,x1",
    "corners": "x0,y0,x1,y1 (not x,y,w,h)",
}
_SCALE_WORDS = {"pixels": "px", "unit": "0..1", "thousandths": "0..1000"}
_SCALE_KINDS = {"pixels": "looks_like_pixels", "unit": "looks_normalised", "thousandths": "looks_like_thousandths"}
_LAYOUT_KINDS = {"xywh": "looks_like_xywh", "yxyx": "axes_swapped", "corners": "looks_like_xyxy"}


@cache
def all_readings(units: str) -> tuple[Reading, ...]:
    """Return the original reading, then the simplest changes: of the layout, of the scale, of both."""
    return tuple(Reading(scale, layout) for scale in _scales_from(units) for layout in LAYOUTS)


def _scales_from(units: str) -> list[str]:
    return [units, *(scale for scale in _SCALES if scale != units)]


def boxes_of(candidate: Candidate) -> Boxes:
    """Return float64[K, 4], as in the annotation."""
    boxes = [box for target in candidate.targets for box in target.boxes_xyxy]
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def _scale_px(units: str, image_size_px: tuple[int, int]) -> Boxes:
    """Return float64[4]: how many pixels one unit is."""
    if units == "pixels":
        return np.ones(4)
    width, height = image_size_px
    return np.array([width, height, width, height], dtype=np.float64) / (1 if units == "unit" else 1000)


def read_as(boxes: Boxes, reading: Reading, image_size_px: tuple[int, int]) -> Boxes:
    """Convert to pixels; infinite beyond the range of a float."""
    with np.errstate(over="ignore", invalid="ignore"):
        return LAYOUTS[reading.layout](boxes) * _scale_px(reading.scale, image_size_px)


def in_pixels(boxes: Boxes, units: str, image_size_px: tuple[int, int]) -> Boxes:
    """Convert to pixels as the annotation was read."""
    return read_as(boxes, Reading(units, "xyxy"), image_size_px)


def fits_of_all(boxes: Boxes, units: str, image_size_px: tuple[int, int]) -> NDArray[np.bool_]:
    """Return bool[R, K]: which boxes fit in each of `all_readings`."""
    scales = np.stack([_scale_px(scale, image_size_px) for scale in _scales_from(units)])
    with np.errstate(over="ignore", invalid="ignore"):
        laid_out = np.stack([layout(boxes) for layout in LAYOUTS.values()])
        boxes_px = laid_out[None] * scales[:, None, None]
    return fit(boxes_px.reshape(-1, 4), image_size_px).reshape(-1, len(boxes))


def fit(boxes_px: Boxes, image_size_px: tuple[int, int]) -> NDArray[np.bool_]:
    """Return bool[K]: is in the image, and at least a pixel wide and high."""
    limit = np.array(image_size_px, dtype=np.float64) + BOX_TOLERANCE_PX
    with np.errstate(over="ignore", invalid="ignore"):
        sides = boxes_px[:, 2:] - boxes_px[:, :2]
    inside = (boxes_px[:, :2] >= -BOX_TOLERANCE_PX).all(axis=1) & (boxes_px[:, 2:] <= limit).all(axis=1)
    return np.asarray(inside & (sides >= 1).all(axis=1))


def count_readings(boxes: Boxes, units: str, image_size_px: tuple[int, int]) -> tuple[Tally, list[Reading]]:
    """Count the boxes that fit in each reading, and the readings that fix everything wrong in this image."""
    tally: Tally = Counter()
    readings = all_readings(units)
    fits = fits_of_all(boxes, units, image_size_px)
    bad = ~fits[0]
    num_bad = int(bad.sum())
    num_fit, num_healed = fits.sum(axis=1).tolist(), fits[:, bad].sum(axis=1).tolist()
    tally["boxes", units] = len(boxes)
    tally["bad", units] = num_bad
    for reading, good, healed in zip(readings, num_fit, num_healed, strict=True):
        tally[("fit", units, *reading)] = good
        tally[("heal", units, *reading)] = healed
    width, height = image_size_px
    if units == "pixels":
        for axis, side, ends in (("x", width, boxes[:, 2]), ("y", height, boxes[:, 3])):
            tally["far", axis] = len(boxes) * (side >= _FAR_PX)
            tally["near 1000", axis] = int(((ends > 900) & (ends <= 1000)).sum())
            tally["beyond 1000", axis] = int((ends > 1000).sum())
    explains = [reading for reading, healed in zip(readings, num_healed, strict=True) if num_bad and healed == num_bad]
    if not num_bad and units == "pixels" and min(width, height) >= 1000:
        explains = [Reading("thousandths", "xyxy")]
    return tally, explains


def judge_readings(tally: Tally) -> list[tuple[str, str, Reading, dict[str, Any]]]:
    """Return (kind, units, reading, values) of the likely meaning of the source; empty if its boxes fit as read."""
    found = []
    for units in _SCALES:
        best, also = _best_reading(tally, units)
        if best is None:
            continue
        boxes, bad = tally["boxes", units], tally["bad", units]
        values = {
            "boxes": boxes,
            "bad": bad,
            "bad_share": f"{bad / boxes:.0%}",
            "as_read": str(Reading(units, "xyxy")),
            "reading": str(best),
            "fits_share": f"{tally[('fit', units, *best)] / boxes:.0%}",
            "also": also["en"],
            "also_zh": also["zh"],
        }
        if best.scale != units:
            found.append((_SCALE_KINDS[best.scale], units, best, values))
        if best.layout != "xyxy":
            found.append((_LAYOUT_KINDS[best.layout], units, best, values))
    return found


def _best_reading(tally: Tally, units: str) -> tuple[Reading | None, dict[str, str]]:
    """Return the simplest of the readings that fit best, with values to report; None if the boxes are fine."""
    boxes, bad = tally["boxes", units], tally["bad", units]
    if bad >= MIN_BAD_BOXES and bad >= MIN_BAD_SHARE * boxes:
        shares = {
            reading: tally[("fit", units, *reading)] / boxes
            for reading in all_readings(units)[1:]
            if tally[("heal", units, *reading)] >= MIN_FIT_SHARE * bad
        }
        highest = max([MIN_FIT_SHARE + _SAME_SHARE, *shares.values()])
        better = [reading for reading, share in shares.items() if share >= highest - _SAME_SHARE]
        others = " / ".join(map(str, better[1:4]))
        if better:
            also = (
                {"en": f" These fit as well: {others}.", "zh": f"同样符合的还有：{others}。"}
                if others
                else {"en": "", "zh": ""}
            )
            return better[0], also
    elif units == "pixels" and _never_beyond_1000(tally):
        words = " But no coordinate is above 1000, although the photos are larger and many come close."
        return Reading("thousandths", "xyxy"), {"en": words, "zh": "但图片更大，却没有坐标超过 1000，且许多接近 1000。"}
    return None, {}


def _never_beyond_1000(tally: Tally) -> bool:
    """Return whether boxes in large images reach 1000 in both directions and never more."""
    many = any(tally["far", axis] >= _MIN_FAR_BOXES for axis in "xy")
    return many and all(tally["near 1000", axis] and not tally["beyond 1000", axis] for axis in "xy")
