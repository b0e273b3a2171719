"""Absent or present, decided by the probability of the not-found sentence alone: the effect of the threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_POINTS = 201


@dataclass(frozen=True)
class NotFoundCurve:
    """points: [threshold, n_acc, t_acc] by increasing threshold; at or above it, the target counts as absent.

    n_acc: fraction of absent targets that count as absent. t_acc: fraction of present targets that do not.
    """

    threshold: float
    balanced_acc: float
    auc: float
    points: list[list[float]]

    def metrics(self) -> dict[str, float]:
        """Return the balanced threshold, the balanced accuracy there, and the AUC."""
        return {
            "not_found_threshold": self.threshold,
            "not_found_balanced_acc": self.balanced_acc,
            "not_found_auc": self.auc,
        }


def not_found_curve(absent: Sequence[float], present: Sequence[float]) -> NotFoundCurve | None:
    """Build the curve from the probabilities of questions about absent and present targets; None if either is empty.

    The threshold is where n_acc and t_acc are closest; of equals that with the higher sum, then the lower one.
    auc: the probability that an absent target scores higher than a present one.
    """
    if not len(absent) or not len(present):
        return None
    low, high = np.sort(np.asarray(present, dtype=np.float64)), np.sort(np.asarray(absent, dtype=np.float64))
    thresholds = np.unique(np.concatenate([low, high, [0.0]]))
    thresholds = np.append(thresholds, np.nextafter(thresholds[-1], np.inf))  # above all: never absent
    n_acc = 1 - np.searchsorted(high, thresholds, side="left") / len(high)
    t_acc = np.searchsorted(low, thresholds, side="left") / len(low)
    best = np.lexsort((thresholds, -(n_acc + t_acc).round(12), np.abs(n_acc - t_acc).round(12)))[0]
    wins = np.searchsorted(low, high, side="left") + np.searchsorted(low, high, side="right")
    shown = np.unique(np.linspace(0, len(thresholds) - 1, min(MAX_POINTS, len(thresholds))).round().astype(int))
    return NotFoundCurve(
        threshold=float(thresholds[best]),
        balanced_acc=float((n_acc[best] + t_acc[best]) / 2),
        auc=float(wins.mean() / 2 / len(low)),
        points=np.stack([thresholds, n_acc, t_acc], axis=1)[shown].tolist(),
    )
