"""This rank's part of the training state under ZeRO-3: its slice of every parameter, of Adam's moments and the average.

The running average of `train.ema` is in Adam's state, beside the moments: fp32, with the same partitions and place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

from cogvlm_ft.runtime.distributed import rank

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "average"


def local_range(parameter: Any) -> tuple[int, int]:
    """Return the elements [start, stop) of the flattened parameter that this rank holds, without ZeRO-3's padding."""
    size = parameter.ds_tensor.numel()
    return min(rank() * size, parameter.ds_numel), min((rank() + 1) * size, parameter.ds_numel)


def local_weight(parameter: Any) -> Tensor:
    """Return this rank's part in float32, padding included: the fp32 master weight, or the frozen weight itself."""
    master = safe_get_local_fp32_param(parameter) if parameter.requires_grad else None
    return parameter.ds_tensor.data.float() if master is None else master


def local_moment(parameter: Any, moment: str) -> Tensor:
    """Return this rank's part of one of `MOMENTS`, or of the `AVERAGE`, in float32, padding included."""
    return safe_get_local_optimizer_state(parameter, moment)


def set_local_weight(parameter: Any, values: Tensor) -> None:
    """Overwrite this rank's part of the weight and of its fp32 master."""
    if parameter.requires_grad:
        safe_set_local_fp32_param(parameter, values)
    parameter.ds_tensor.data.copy_(values)


def set_local_moment(parameter: Any, values: Tensor, moment: str) -> None:
    """Overwrite this rank's part of one of `MOMENTS`, or of the `AVERAGE`, which must exist."""
    safe_set_local_optimizer_state(parameter, values, moment)


def reset_moments(engine: Any, step: int) -> None:
    """Create Adam's state for every trained parameter, as after `step` updates that left moments of zero."""
    optimizer = engine.optimizer.optimizer
    is_torch = isinstance(optimizer, torch.optim.AdamW)  # DeepSpeed's optimizers count in an int
    for flat in engine.optimizer.fp32_partitioned_groups_flat:
        optimizer.state[flat] |= {
            "step": torch.tensor(float(step), device=flat.device) if is_torch else step,
            **{moment: torch.zeros_like(flat) for moment in MOMENTS},
        }


def start_averages(engine: Any) -> None:
    """Start the running average of every trained parameter at its weight. Adam's state is created if there is none."""
    if not engine.optimizer.optimizer.state:
        reset_moments(engine, 0)
    for flat in engine.optimizer.fp32_partitioned_groups_flat:
        engine.optimizer.optimizer.state[flat][AVERAGE] = flat.detach().clone()


def has_averages(engine: Any) -> bool:
    """Return whether `start_averages` was called."""
    return any(AVERAGE in state for state in engine.optimizer.optimizer.state.values())


def update_averages(engine: Any, decay: float) -> None:
    """Set every average to decay x average + (1 - decay) x weight, in fp32."""
    with torch.no_grad():
        for flat in engine.optimizer.fp32_partitioned_groups_flat:
            engine.optimizer.optimizer.state[flat][AVERAGE].mul_(decay).add_(flat, alpha=1 - decay)


@contextlib.contextmanager
def averages_as_weights(engine: Any) -> Iterator[None]:
    """Exchange the weights and their averages inside. Collective."""
    _exchange_averages(engine)
    try:
        yield
    finally:
        _exchange_averages(engine)


def _exchange_averages(engine: Any) -> None:
    with torch.no_grad(), overwriting_state(engine):
        for parameter in engine.module.parameters():
            if parameter.requires_grad:
                weight = local_weight(parameter).clone()
                set_local_weight(parameter, local_moment(parameter, AVERAGE))
                set_local_moment(parameter, weight, AVERAGE)


def optimizer_step(engine: Any) -> int:
    """Return the number of updates Adam has made; 0 before its state exists."""
    states = engine.optimizer.optimizer.state
    return max((int(state["step"]) for state in states.values() if "step" in state), default=0)


@contextlib.contextmanager
def overwriting_state(engine: Any) -> Iterator[None]:
    """Wrap changes to the local state; afterwards every copy on other ranks is current again. Collective."""
    engine.optimizer.checkpoint_event_prologue()
    yield
    engine.optimizer.checkpoint_event_epilogue()  # small weights that every rank holds whole, hpZ's copies
