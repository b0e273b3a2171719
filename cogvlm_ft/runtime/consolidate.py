"""Whole tensors out of a ZeRO-3 checkpoint, one at a time, without a GPU or a process group."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.runtime.checkpoint import STATE_FILE, ZERO_TAG


class LazyTensor(Protocol):
    """A float32 tensor whose parts lie in the ranks' mapped files until `contiguous` puts them together."""

    shape: torch.Size

    def contiguous(self) -> Tensor: ...


def open_weights(checkpoint: Path) -> dict[str, LazyTensor]:
    """Every parameter by name. DeepSpeed's files are pickles: open only checkpoints that you trust."""
    if not (checkpoint / STATE_FILE).is_file():
        raise CheckpointError(
            f"{checkpoint} is no training checkpoint: wanted a folder such as runs/x/checkpoints/step-00000100 "
            f"with {STATE_FILE} and {ZERO_TAG}/ in it"
        )
    weights: dict[str, LazyTensor] = get_fp32_state_dict_from_zero_checkpoint(
        str(checkpoint), tag=ZERO_TAG, lazy_mode=True
    )
    return {name: tensor for name, tensor in weights.items() if not name.endswith(".inv_freq")}  # derived, not trained
