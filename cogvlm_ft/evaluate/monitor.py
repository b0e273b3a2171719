"""The monitored value of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cogvlm_ft.grounding.metrics import is_lower_better

COMPOSITE = "monitor"
"""Name of the weighted sum of several metrics."""


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
