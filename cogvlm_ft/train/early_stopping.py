"""The monitored value of an evaluation, the best one so far, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cogvlm_ft.checkpoints.checkpoint import Best, TrainState
from cogvlm_ft.grounding.metrics import is_lower_better
from cogvlm_ft.settings import TrainConfig

COMPOSITE = "monitor"
"""What the weighted sum of several metrics is called among them."""


def monitor_name(monitor: Any) -> str:
    """Return the metric's name, or `monitor` for several metrics."""
    return monitor if isinstance(monitor, str) else COMPOSITE


def monitor_value(metrics: Mapping[str, float], monitor: Any) -> float | None:
    """Return the metric, or the sum of weight x metric with a minus where lower is better.

    None if these answers have no value for it, as precision without a single box. What can never have one is refused
    before training: `evaluate.measurable`.
    """
    weights: Mapping[str, float] = {monitor: 1.0} if isinstance(monitor, str) else monitor
    if not all(math.isfinite(metrics.get(name, math.nan)) for name in weights):
        return None
    if isinstance(monitor, str):
        return metrics[monitor]
    return sum(weight * metrics[name] * (-1 if is_lower_better(name) else 1) for name, weight in weights.items())


def updated_best(best: Best | None, value: float | None, step: int, train: TrainConfig) -> Best | None:
    """Return the best value so far, after an evaluation at `step`; one without a value brings no gain.

    A gain of up to `train.min_gain` does not count. With another `train.monitor` than before, comparison starts over.
    """
    if value is None:
        return replace(best, num_since=best.num_since + 1) if best else None
    new = Best(value, step, monitor=str(train.monitor))
    if best is None or best.monitor != new.monitor:
        return new
    lower = isinstance(train.monitor, str) and is_lower_better(train.monitor)
    gain = best.value - value if lower else value - best.value
    return new if gain > train.min_gain else replace(best, num_since=best.num_since + 1)


def is_out_of_patience(state: TrainState, train: TrainConfig) -> bool:
    """Return whether `train.patience` evaluations in a row brought no new best."""
    return train.patience is not None and state.best is not None and state.best.num_since >= train.patience
