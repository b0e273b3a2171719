"""The best monitored value so far, and when to stop."""

from __future__ import annotations

from dataclasses import replace

from cogvlm_ft.checkpoints.checkpoint import Best, TrainState
from cogvlm_ft.grounding.metrics import is_lower_better
from cogvlm_ft.settings import TrainConfig


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
