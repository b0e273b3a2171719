"""What a training run leaves: its last checkpoint, whole."""

from __future__ import annotations

from pathlib import Path

import torch

from cogvlm_ft.checkpoints.checkpoint import list_checkpoints
from cogvlm_ft.checkpoints.consolidate import open_weights
from cogvlm_ft.checkpoints.slices import MOMENTS, open_slices
from cogvlm_ft.model.loading import read_whole


def last_state(run: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of the last checkpoint."""
    checkpoint = list_checkpoints(run / "checkpoints")[-1]
    tensors = {f"weight/{name}": tensor for name, tensor in open_weights(checkpoint).items()}
    for moment in MOMENTS:
        tensors |= {f"{moment}/{name}": tensor for name, tensor in open_slices(checkpoint, moment).items()}
    return {key: read_whole(tensor, torch.float32) for key, tensor in tensors.items()}


def assert_same_end(found: Path, expected: Path, tolerance: float = 0.0) -> None:
    """Compare the last checkpoints of two runs: their steps, weights and moments."""
    last = [list_checkpoints(run / "checkpoints")[-1].name for run in (found, expected)]
    assert last[0] == last[1]
    a, b = last_state(found), last_state(expected)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=tolerance, rtol=0, msg=lambda m, k=key: f"{k}: {m}")
