"""Which boxes to keep, decided by their confidence alone: the effect of the threshold, as detectors report it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cogvlm_ft.grounding.average_precision import RankedBoxes

MAX_POINTS = 201


@dataclass(frozen=True)
class KeptBoxes:
    """Which boxes from tiles count. only_best: of each question only the most confident one."""

    min_confidence: float = 0.0
    only_best: bool = False


@dataclass(frozen=True)
class ConfidenceCurve:
    """points: [threshold, precision, recall, f1] by decreasing threshold, at IoU 0.5, with the boxes at or above it.

    kept: the choice. Its min_confidence is halfway from the last box that is kept at the highest F1 to the next one; 0
    where all are kept.
    """

    kept: KeptBoxes
    f1: float
    points: list[list[float]]


def choose_boxes(questions: Sequence[RankedBoxes]) -> ConfidenceCurve | None:
    """Choose which boxes count; only the most confident one if no question has more than one true box."""
    return confidence_curve(questions, only_best=all(question.num_true <= 1 for question in questions))


def confidence_curve(questions: Sequence[RankedBoxes], *, only_best: bool = False) -> ConfidenceCurve | None:
    """Build the curve over the answered boxes of all questions; None without true or without answered boxes."""
    num_true = sum(question.num_true for question in questions)
    first = slice(1 if only_best else None)
    confidence = np.concatenate([np.zeros(0), *(question.confidence[first] for question in questions)])
    if not num_true or not len(confidence):
        return None
    order = np.argsort(-confidence, kind="stable")
    confidence, hit = confidence[order], np.concatenate([question.hit[0, first] for question in questions])[order]
    last = np.append(np.flatnonzero(np.diff(confidence)), len(confidence) - 1)  # boxes of equal confidence go together
    num_kept, num_right = last + 1, np.cumsum(hit)[last]
    f1 = 2 * num_right / (num_kept + num_true)
    points = np.stack([confidence[last], num_right / num_kept, num_right / num_true, f1], axis=1)
    best = int(f1.argmax())
    below = confidence[last[best + 1]] if best + 1 < len(last) else -confidence[last[best]]
    shown = np.unique(np.linspace(0, len(points) - 1, min(MAX_POINTS, len(points))).round().astype(int))
    kept = KeptBoxes(float((confidence[last[best]] + below) / 2), only_best)
    return ConfidenceCurve(kept, float(f1[best]), points[shown].tolist())
