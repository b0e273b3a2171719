"""COCO's average precision and recall: boxes of a whole evaluation, ranked by their confidence.

The rules are those of the COCO evaluation: IoU thresholds 0.50 to 0.95 in steps of 0.05, precision at 101 recalls, at
most 100 boxes per question, boxes of equal confidence in their original order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cogvlm_ft.grounding.overlap import pairwise_iou

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MAX_BOXES = (1, 10, 100)
COCO_AREAS_PX2: Mapping[str, tuple[float, float]] = {
    "small": (0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
"""COCO's area ranges in square pixels; both bounds are inclusive."""
ANY_AREA = (0.0, 1e10)


@dataclass(frozen=True)
class RankedBoxes:
    """The answered boxes of one question, the most confident first; T = 10 thresholds, P boxes.

    confidence: [P]. hit, ignored: bool[T, P]; an ignored box is neither right nor wrong. num_true: boxes to be found.
    """

    confidence: NDArray[np.float64]
    hit: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    num_true: int


def rank_boxes(
    predicted_xyxy: ArrayLike,
    confidence: ArrayLike | None,
    truth_xyxy: ArrayLike,
    area_px2: tuple[float, float] = ANY_AREA,
) -> RankedBoxes:
    """Match the boxes of one question.

    confidence: one per answered box; None = 1.0 each. area_px2: true boxes with an area outside these bounds need not
    be found, and unmatched answered boxes outside them are ignored.
    """
    predicted = np.asarray(predicted_xyxy, dtype=np.float64).reshape(-1, 4)
    truth = np.asarray(truth_xyxy, dtype=np.float64).reshape(-1, 4)
    ranks = np.ones(len(predicted)) if confidence is None else np.asarray(confidence, dtype=np.float64)
    order = np.argsort(-ranks, kind="stable")[: MAX_BOXES[-1]]
    predicted = predicted[order]
    optional = ~_has_area(truth, area_px2)
    columns = np.argsort(optional, kind="stable")  # required boxes first
    iou, optional = pairwise_iou(predicted, truth[columns]), optional[columns]
    matched = _match(iou, optional)
    hit = matched >= 0
    of_optional = np.zeros_like(hit)
    of_optional[hit] = optional[matched[hit]]
    ignored = of_optional | (~hit & ~_has_area(predicted, area_px2))
    return RankedBoxes(ranks[order], hit, ignored, int((~optional).sum()))


def _match(iou: NDArray[np.float64], optional: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Return [T, P]: the index of the true box that each answered box matches; -1 for none.

    Of the true boxes that are still free, the one with the highest IoU; of equal ones the last.
    """
    num_boxes, num_true = iou.shape
    matched = np.full((len(IOU_THRESHOLDS), num_boxes), -1, dtype=np.intp)
    if not num_true:
        return matched
    rows, free = np.arange(len(IOU_THRESHOLDS)), np.ones((len(IOU_THRESHOLDS), num_true), dtype=bool)
    for box, overlap in enumerate(iou):
        good = free & (overlap >= np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None])
        required = (good & ~optional).any(axis=1)  # an optional box is taken only if no required one fits
        good &= ~(required[:, None] & optional)
        best = num_true - 1 - np.where(good, overlap, -1.0)[:, ::-1].argmax(axis=1)
        found = good.any(axis=1)
        matched[found, box] = best[found]
        free[rows[found], best[found]] = False
    return matched


def _has_area(boxes: NDArray[np.float64], area_px2: tuple[float, float]) -> NDArray[np.bool_]:
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return np.asarray((area >= area_px2[0]) & (area <= area_px2[1]))


def average_precision(questions: Sequence[RankedBoxes]) -> dict[str, float]:
    """Return ap (mean over the thresholds), ap50, ap75, and ar1, ar10, ar100: recall with that many boxes per question.

    Empty if there is no true box to be found.
    """
    precision, recall = _precision_recall(questions, MAX_BOXES[-1])
    if precision is None:
        return {}
    values = {"ap": precision.mean(), "ap50": precision[0].mean(), "ap75": precision[5].mean()}
    for num_boxes in MAX_BOXES[:-1]:
        values[f"ar{num_boxes}"] = _precision_recall(questions, num_boxes)[1].mean()
    return {name: float(value) for name, value in (values | {f"ar{MAX_BOXES[-1]}": recall.mean()}).items()}


def precision_recall_curve(questions: Sequence[RankedBoxes]) -> list[list[float]]:
    """Return points [recall, precision] at IoU 0.5, for recalls 0, 0.01, ... 1; empty if there is no true box."""
    precision, _ = _precision_recall(questions, MAX_BOXES[-1])
    return [] if precision is None else np.stack([RECALLS, precision[0]], axis=1).tolist()


def _precision_recall(
    questions: Sequence[RankedBoxes], num_boxes: int
) -> tuple[NDArray[np.float64] | None, NDArray[np.float64]]:
    """Return precision [T, 101] at RECALLS (None if there is no true box to be found) and the highest recall [T]."""
    num_true = sum(question.num_true for question in questions)
    if not num_true:
        return None, np.zeros(len(IOU_THRESHOLDS))
    confidence = np.concatenate([question.confidence[:num_boxes] for question in questions])
    order = np.argsort(-confidence, kind="stable")
    hit = np.concatenate([question.hit[:, :num_boxes] for question in questions], axis=1)[:, order]
    counted = ~np.concatenate([question.ignored[:, :num_boxes] for question in questions], axis=1)[:, order]
    num_right, num_wrong = np.cumsum(hit & counted, axis=1), np.cumsum(~hit & counted, axis=1)
    recall = num_right / num_true
    precision = num_right / np.maximum(num_right + num_wrong, 1)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # the highest at this recall or a higher one
    at_recalls = np.zeros((len(IOU_THRESHOLDS), len(RECALLS)))
    for row in range(len(IOU_THRESHOLDS)):
        places = np.searchsorted(recall[row], RECALLS, side="left")
        reached = places < recall.shape[1]
        at_recalls[row, reached] = precision[row, places[reached]]
    return at_recalls, recall[:, -1] if recall.shape[1] else np.zeros(len(IOU_THRESHOLDS))
