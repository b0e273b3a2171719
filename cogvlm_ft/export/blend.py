"""Blend a checkpoint with the model it started from: the weights between them forget less and keep most of the gain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.model.loading import (
    POSITION_TABLE,
    Weight,
    check_keys,
    interpolate_position_embedding,
    open_tensors,
    read_whole,
)


@dataclass(frozen=True)
class Blend:
    """How much of the checkpoint is in the weights, and the model folder that the rest is from."""

    fraction: float
    start: Path


@dataclass(frozen=True)
class BlendedTensor:
    """start * (1 - fraction) + tuned * fraction in fp32, computed where it is read."""

    start: Weight
    tuned: Weight
    fraction: float

    @property
    def shape(self) -> torch.Size:
        return self.tuned.shape

    def read(self, start: int, stop: int) -> Tensor:
        before, after = (_part(weight, start, stop) for weight in (self.start, self.tuned))
        return before * (1 - self.fraction) + after * self.fraction


def _part(weight: Weight, start: int, stop: int) -> Tensor:
    part = weight.reshape(-1)[start:stop] if isinstance(weight, Tensor) else weight.read(start, stop)
    return part.float()


def blended(contents: Mapping[str, Weight], blend: Blend) -> dict[str, Weight]:
    """Blend the stored tensors of a checkpoint with those of the model folder; computed buffers stay as they are.

    Raises CheckpointError where the folder's weights are those of another model.
    """
    pairs = pair_with_start(contents, blend.start)
    return {
        name: BlendedTensor(*pairs[name], blend.fraction) if name in pairs else weight
        for name, weight in contents.items()
    }


def pair_with_start(contents: Mapping[str, Weight], start: Path) -> dict[str, tuple[Weight, Weight]]:
    """Return each stored tensor of a checkpoint after that of the model folder. Raises CheckpointError."""
    if not (start / "config.json").is_file():
        raise CheckpointError(
            f"--start {start}: no config.json found; expected the model folder that training started from"
        )
    stored: dict[str, Weight] = {**open_tensors(start)}
    trained = {name: weight for name, weight in contents.items() if not isinstance(weight, Tensor)}
    found = {name: tuple(weight.shape) for name, weight in stored.items() if not name.endswith(".inv_freq")}
    check_keys(start, {name: tuple(weight.shape) for name, weight in trained.items()}, found)
    if POSITION_TABLE in trained and found[POSITION_TABLE] != tuple(trained[POSITION_TABLE].shape):
        table = read_whole(stored[POSITION_TABLE], torch.float32)
        stored[POSITION_TABLE] = interpolate_position_embedding(table, trained[POSITION_TABLE].shape[0])
    return {name: (stored[name], weight) for name, weight in trained.items()}


def check_fraction(fraction: float) -> None:
    """Raise CheckpointError unless the fraction is from 0 to 1."""
    if not (math.isfinite(fraction) and 0 <= fraction <= 1):
        raise CheckpointError(
            f"--blend {fraction:g}: expected 0 (the model at the start) to 1 (the checkpoint), such as 0.6"
        )
