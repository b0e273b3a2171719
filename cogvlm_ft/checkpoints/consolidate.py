"""Reads whole tensors from a training checkpoint, one at a time, without a GPU or a process group."""

from __future__ import annotations

from pathlib import Path

from cogvlm_ft.checkpoints.manifest import find_damage
from cogvlm_ft.checkpoints.slices import SlicedTensor, open_slices
from cogvlm_ft.errors import CheckpointError


def open_weights(checkpoint: Path) -> dict[str, SlicedTensor]:
    """Return every parameter by name, read when accessed; CheckpointError if the checkpoint is not intact."""
    damage = find_damage(checkpoint)
    if damage:
        raise CheckpointError(
            f"{checkpoint} cannot be used; expected an intact folder such as runs/x/checkpoints/step-00000100:\n  "
            + "\n  ".join(damage)
        )
    return open_slices(checkpoint)
