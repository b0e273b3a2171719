"""Merge what was answered about a whole photo and its tiles into one list of boxes.

1. Boxes of several tiles with IoU 0.5 or more are one: their mean, weighted by confidence / area of the tile, because
   the error of a coordinate grows with what is shown. So is a box of the whole photo, unless it is so small there that
   it was barely seen: then the nearest box of a tile that it touches, or misses by a patch, replaces it.
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
"""Minimum IoU of two boxes of one object, and minimum fraction of a partial box that the complete box covers."""
EVERY_BOX = KeptBoxes()
MIN_PATCHES = 2.0
"""Minimum number of patches on the shorter side of a box; smaller boxes are barely visible to the model."""

_DIGITS = 6  # of a confidence: rounding errors of other batches must not decide between tiles that show the same


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
    highest. removed: boxes that do not count, with their confidences. num_duplicates: boxes that merging removed.
    not_found: no box is left, and all answers were readable. not_found_prob: the lowest of all answers. best: index of
    the answer that gave the most confident box; without boxes, of the first unreadable one, else of the first "not
    found", else 0.
    """

    boxes: list[Box] | None
    confidences: list[float]
    not_found: bool
    not_found_prob: float | None
    num_duplicates: int
    removed: list[tuple[Box, float]]
    best: int

    @property
    def num_removed(self) -> int:
        return len(self.removed)


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
    num_kept = sum(group.confidence >= rule.min_confidence for group in groups)
    num_kept = min(num_kept, 1) if rule.only_best else num_kept
    kept, removed = groups[:num_kept], groups[num_kept:]
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
        removed=[(group.box, group.confidence) for group in removed],
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
        confidence = round(is_there * of_digits, _DIGITS)
        sides = (box[2] - box[0]) / answer.patch_px[0], (box[3] - box[1]) / answer.patch_px[1]
        slack = answer.patch_px if is_whole and min(sides) < MIN_PATCHES else (0.0, 0.0)
        is_part = is_cut(box, window, size_px, margin)
        rows.append(_Found(box, confidence, number, max(confidence, 1e-6) / area, is_part, is_whole, slack))
    return rows


def _group(found: Sequence[_Found]) -> list[_Group]:
    """Group complete boxes of tiles first, then those of the whole photo, then parts; each by confidence.

    A box joins the group that it overlaps most. What was barely seen waits until all others have found theirs: within a
    patch there may be several objects.
    """
    order = sorted(found, key=lambda each: (each.is_part, each.is_whole_photo, -each.confidence))
    complete, boxes, barely_seen = list[_Group](), np.zeros((len(found), 4)), list[_Found]()
    for each in (each for each in order if not each.is_part):
        same = _others(each, complete, pairwise_iou([each.box], boxes[: len(complete)])[0], SAME)
        if same is None and any(each.slack_px):
            barely_seen.append(each)
            continue
        number = len(complete) if same is None else same
        if same is None:
            complete.append(_Group(each.box, each.confidence, set()))
        _join(each, complete[number])
        boxes[number] = complete[number].box
    for each in barely_seen:
        near = _others(each, complete, _nearness(each, boxes[: len(complete)]))
        if near is None:
            boxes[len(complete)] = each.box
            complete.append(_Group(each.box, each.confidence, set()))
        _join(each, complete[-1 if near is None else near])
    parts: list[_Group] = []
    for each in (each for each in order if each.is_part):
        if (_covered(each.box, boxes[: len(complete)]) < SAME).all():
            _join_part(each, parts)
    return complete + parts


def _others(each: _Found, groups: Sequence[_Group], scores: NDArray[np.float64], least: float = 0.0) -> int | None:
    """Return the group with the highest positive score from `least` on that has no box of the same answer."""
    usable = np.flatnonzero((scores >= least) & (scores > 0))
    best_first = usable[np.argsort(-scores[usable], kind="stable")].tolist()
    return next((number for number in best_first if each.answer not in groups[number].answers), None)


def _nearness(each: _Found, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a score for each box that touches this one, grown by its slack: higher for nearer centres; else 0."""
    x0, y0, x1, y1 = each.box
    (dx, dy), centre = each.slack_px, np.array([x0 + x1, y0 + y1])
    touches = pairwise_iou([(x0 - dx, y0 - dy, x1 + dx, y1 + dy)], boxes)[0] > 0
    return np.where(touches, 1 / (1 + np.hypot(*(boxes[:, :2] + boxes[:, 2:] - centre).T)), 0)


def _join(each: _Found, group: _Group) -> None:
    """Add a complete box to a group. What was barely seen changes no coordinate."""
    group.answers.add(each.answer)
    group.confidence = max(group.confidence, each.confidence)
    if not any(each.slack_px):
        group.members.append((each.box, each.weight))
        group.box = group.mean() if len(group.members) > 1 else each.box


def _join_part(part: _Found, parts: list[_Group]) -> None:
    """Join a part with the groups of parts of other tiles that it overlaps."""
    overlaps = pairwise_iou([part.box], [group.box for group in parts])[0] > 0
    touched = [g for g, is_near in zip(parts, overlaps, strict=True) if is_near and part.answer not in g.answers]
    box, answers, confidence = part.box, {part.answer}, part.confidence
    for group in touched:
        box, answers = enclosing_box([box, group.box]), answers | group.answers
        confidence = max(confidence, group.confidence)
        parts.remove(group)
    parts.append(_Group(box, confidence, answers))


def _covered(part: Box, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the fraction of the part that each box covers."""
    sides = np.minimum(part[2:], boxes[:, 2:]) - np.maximum(part[:2], boxes[:, :2])
    area = (part[2] - part[0]) * (part[3] - part[1])
    return np.clip(sides, 0, None).prod(axis=1) / area if area > 0 else np.zeros(len(boxes))
