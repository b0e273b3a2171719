"""Merge what was answered about a whole photo and its tiles into one list of boxes.

1. Boxes of several tiles with IoU 0.5 or more are one: their mean, weighted by confidence / area of the tile, because
   the error of a coordinate grows with what is shown. So is a box of the whole photo, unless it is so small there that
   it was barely seen: then a box of a tile that it touches, or misses by a patch, replaces it.
2. A box that ends at an inner edge of its tile is a part of what neighbouring tiles show: a complete box that covers
   half of it replaces it; parts that overlap each other become one box.
3. Boxes of one answer are never merged with each other.
4. Of the boxes that are left, those below a least confidence are removed, and perhaps all but the most confident one.
   A target is asked in every tile and is in few of them: a few wrong boxes per tile outnumber the right ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cogvlm_ft.grounding.confidence import KeptBoxes
from cogvlm_ft.grounding.overlap import enclosing_box, pairwise_iou
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.grounding.tiles import Window, is_cut

SAME = 0.5
"""Least IoU of two boxes of one object, and least fraction of a part that the complete box covers."""
EVERY_BOX = KeptBoxes()
MIN_PATCHES = 2.0
"""A box with fewer patches on its shorter side is barely seen."""


@dataclass(frozen=True)
class TileAnswer:
    """One answer about one part of a photo. window: what was shown. boxes: in pixels of the photo; None: unreadable.

    confidences: of the boxes, if there are any; 1 where unknown. patch_px: (width, height) of a vision patch in pixels
    of the photo.
    """

    window: Window
    boxes: Sequence[Box] | None
    confidences: Sequence[float]
    patch_px: tuple[float, float]
    not_found: bool = False
    not_found_prob: float | None = None


@dataclass(frozen=True)
class MergedAnswer:
    """boxes: None if none is left and an answer was unreadable.

    confidences: that of the digits, times the probability that the answer is not "not found"; of merged boxes the
    highest. num_duplicates: boxes that merging removed. num_removed: boxes that do not count. not_found: no
    box is left, and all answers were readable. not_found_prob: the lowest of all answers. best: index of the answer
    that gave the most confident box; without boxes, of the first unreadable one, else of the first "not found", else 0.
    """

    boxes: list[Box] | None
    confidences: list[float]
    not_found: bool
    not_found_prob: float | None
    num_duplicates: int
    num_removed: int
    best: int


@dataclass
class _Group:
    """Boxes of one object, the first of which leads. answers: numbers of the answers that they are from."""

    box: Box
    confidence: float
    answers: set[int]
    members: list[tuple[Box, float]] = field(default_factory=list)

    def mean(self) -> Box:
        """Return the weighted mean of the members."""
        boxes = np.array([box for box, _ in self.members])
        x0, y0, x1, y1 = np.average(boxes, axis=0, weights=[weight for _, weight in self.members]).tolist()
        return x0, y0, x1, y1


@dataclass(frozen=True)
class _Found:
    """One box of one answer."""

    box: Box
    confidence: float
    answer: int
    weight: float
    is_part: bool
    is_whole_photo: bool
    slack_px: tuple[float, float]


def merge_answers(answers: Sequence[TileAnswer], size_px: tuple[int, int], rule: KeptBoxes = EVERY_BOX) -> MergedAnswer:
    """Merge the answers to one question. size_px: of the photo."""
    found = [each for number, answer in enumerate(answers) for each in _found_in(number, answer, size_px)]
    groups = sorted(_group(found), key=lambda group: -group.confidence)
    kept = [group for group in groups if group.confidence >= rule.min_confidence][: 1 if rule.only_best else None]
    saying_so = [number for number, answer in enumerate(answers) if answer.not_found]
    unreadable = [number for number, answer in enumerate(answers) if not answer.not_found and not answer.boxes]
    probs = [answer.not_found_prob for answer in answers if answer.not_found_prob is not None]
    best = max(found, key=lambda each: each.confidence).answer if kept else next(iter(unreadable or saying_so), 0)
    return MergedAnswer(
        boxes=None if not kept and unreadable else [group.box for group in kept],
        confidences=[group.confidence for group in kept],
        not_found=not kept and not unreadable,
        not_found_prob=min(probs) if probs else None,
        num_duplicates=len(found) - len(groups),
        num_removed=len(groups) - len(kept),
        best=best,
    )


def _found_in(number: int, answer: TileAnswer, size_px: tuple[int, int]) -> list[_Found]:
    window = answer.window
    is_whole = window == (0, 0, *size_px)
    area = max(1, (window[2] - window[0]) * (window[3] - window[1]))
    margin = max(answer.patch_px) / 4
    rows = []
    is_there = 1.0 - (answer.not_found_prob or 0.0)
    for box, of_digits in zip(answer.boxes or (), answer.confidences, strict=True):
        confidence = is_there * of_digits
        sides = (box[2] - box[0]) / answer.patch_px[0], (box[3] - box[1]) / answer.patch_px[1]
        slack = answer.patch_px if is_whole and min(sides) < MIN_PATCHES else (0.0, 0.0)
        is_part = is_cut(box, window, size_px, margin)
        rows.append(_Found(box, confidence, number, max(confidence, 1e-6) / area, is_part, is_whole, slack))
    return rows


def _group(found: Sequence[_Found]) -> list[_Group]:
    """Group complete boxes of tiles first, then those of the whole photo, then parts; each by confidence."""
    order = sorted(found, key=lambda each: (each.is_part, each.is_whole_photo, -each.confidence))
    complete: list[_Group] = []
    for each in (each for each in order if not each.is_part):
        same = next((group for group in complete if each.answer not in group.answers and _is_same(each, group)), None)
        if same is None:
            group = _Group(each.box, each.confidence, {each.answer}, [(each.box, each.weight)])
            complete.append(group)
            continue
        same.answers.add(each.answer)
        same.confidence = max(same.confidence, each.confidence)
        if not any(each.slack_px):
            same.members.append((each.box, each.weight))
            same.box = same.mean()
    parts: list[_Group] = []
    for each in (each for each in order if each.is_part):
        if any(_covered(each.box, group.box) >= SAME for group in complete):
            continue
        _join_part(each, parts)
    return complete + parts


def _is_same(each: _Found, group: _Group) -> bool:
    if pairwise_iou([each.box], [group.box]).item() >= SAME:
        return True
    if not any(each.slack_px):
        return False
    x0, y0, x1, y1 = each.box
    grown = (x0 - each.slack_px[0], y0 - each.slack_px[1], x1 + each.slack_px[0], y1 + each.slack_px[1])
    return pairwise_iou([grown], [group.box]).item() > 0


def _join_part(part: _Found, parts: list[_Group]) -> None:
    """Join a part with the groups of parts of other tiles that it overlaps."""
    touched = [g for g in parts if part.answer not in g.answers and pairwise_iou([part.box], [g.box]).item() > 0]
    box, answers, confidence = part.box, {part.answer}, part.confidence
    for group in touched:
        box, answers = enclosing_box([box, group.box]), answers | group.answers
        confidence = max(confidence, group.confidence)
        parts.remove(group)
    parts.append(_Group(box, confidence, answers))


def _covered(part: Box, box: Box) -> float:
    """Return the fraction of the part that a box covers."""
    sides: NDArray[np.float64] = np.minimum(part[2:], box[2:]) - np.maximum(part[:2], box[:2])
    area = (part[2] - part[0]) * (part[3] - part[1])
    return float(np.clip(sides, 0, None).prod() / area) if area > 0 else 0.0
