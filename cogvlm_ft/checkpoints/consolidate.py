"""Read the weights of a training checkpoint, one tensor at a time, without its optimizer states."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cogvlm_ft.checkpoints.adapters import AdapterRecord, merge_adapters, merged, merged_with_base
from cogvlm_ft.checkpoints.choice import is_checkpoint
from cogvlm_ft.checkpoints.manifest import find_damage
from cogvlm_ft.checkpoints.peft_files import open_peft_adapter
from cogvlm_ft.checkpoints.slices import open_slices
from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.model import CogVLMConfig
from cogvlm_ft.model.loading import POSITION_TABLE, Assign, StoredTensor, check_keys, interpolate_position_embedding
from cogvlm_ft.runtime.partitions import AVERAGE
from cogvlm_ft.runtime.watchdog import progress
from cogvlm_ft.terminal import progress_bar


def open_weights(checkpoint: Path, *, averaged: bool = False) -> dict[str, StoredTensor]:
    """Return every parameter by name, read when accessed; CheckpointError if the checkpoint is not intact.

    Adapters are merged into their base. averaged: the running averages of `train.ema` in place of the trained weights.
    """
    damage = find_damage(checkpoint)
    if damage:
        raise CheckpointError(
            f"{checkpoint} cannot be used; expected an intact folder such as runs/x/checkpoints/step-00000100:\n  "
            + "\n  ".join(damage)
        )
    stored = open_last_or_average(checkpoint, averaged=averaged)
    record = AdapterRecord.load(checkpoint)
    return stored if record is None else merge_adapters(checkpoint, record, stored)


def open_last_or_average(checkpoint: Path, *, averaged: bool) -> dict[str, StoredTensor]:
    """Return the tensors that a checkpoint holds. averaged: where there is a running average, that one."""
    averages = open_slices(checkpoint, AVERAGE) if averaged else {}
    if averaged and not averages:
        raise CheckpointError(
            f"--weights-of ema: {checkpoint}: found no running averages; expected a checkpoint of a run with "
            "train.ema. Omit --weights-of, or choose another checkpoint"
        )
    return {**open_slices(checkpoint), **averages}


def assign_weights(checkpoint: Path, expected: dict[str, tuple[int, ...]], assign: Assign) -> None:
    """Call `assign` for every parameter, as `load_weights` does for a model folder. Collective.

    Raises CheckpointError if the checkpoint is not intact, or is that of another model.
    """
    _assign(checkpoint, open_weights(checkpoint), expected, assign)


def assign_merged(
    adapter: Path, base: Path, config: CogVLMConfig, expected: dict[str, tuple[int, ...]], assign: Assign
) -> None:
    """Call `assign` for every parameter of a model folder or a checkpoint with an adapter of peft merged.

    config: of the model that is loaded. Raises CheckpointError if they do not fit.
    """
    found = open_peft_adapter(adapter, base, expected)
    if is_checkpoint(base):
        weights = merged(open_weights(base), found.tensors, found.scale)
    else:
        weights = merged_with_base(base, found.tensors, found.scale, config)
    _assign(base, weights, expected, assign)


def _assign(
    source: Path, weights: Mapping[str, StoredTensor], expected: dict[str, tuple[int, ...]], assign: Assign
) -> None:
    check_keys(source, expected, {name: tuple(stored.shape) for name, stored in weights.items()})
    for name, shape in progress_bar(expected.items(), desc="load weights", unit="tensor"):
        progress()
        rows = _Rows(weights[name])
        if name == POSITION_TABLE and weights[name].shape[0] != shape[0]:
            table = interpolate_position_embedding(rows.read(0, weights[name].shape[0]), shape[0])
            assign(name, lambda start, stop, table=table: table[start:stop], shape[0])  # type: ignore[misc]
        else:
            assign(name, rows.read, shape[0])


@dataclass(frozen=True)
class _Rows:
    """A stored tensor, read by the rows of its first dimension."""

    stored: StoredTensor

    def read(self, start: int, stop: int) -> Tensor:
        shape = self.stored.shape
        width = math.prod(shape[1:])
        return self.stored.read(start * width, stop * width).reshape(stop - start, *shape[1:])
