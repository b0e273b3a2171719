"""The training state in slices: each rank's part of every parameter and of Adam's two moments.

    ranks/rank-00000.safetensors    weight/NAME, exp_avg/NAME, exp_avg_sq/NAME, and average/NAME with train.ema:
                                    float32, flat, without ZeRO-3's padding
    layout.json                     world size, shapes, Adam's step count

The slices of a tensor, in the order of the ranks, are the flattened tensor. Any number of ranks can cut their own
slices from them, and no rank reads more than it keeps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvlm_ft.checkpoints.reading import is_wrong_part, read_again
from cogvlm_ft.errors import CheckpointError, ConfigError
from cogvlm_ft.model.adapters import checkpointed
from cogvlm_ft.plain_files import read_json
from cogvlm_ft.runtime.distributed import world_size
from cogvlm_ft.runtime.partitions import (
    AVERAGE,
    MOMENTS,
    has_averages,
    local_moment,
    local_range,
    local_weight,
    optimizer_step,
    overwriting_state,
    reset_moments,
    set_local_moment,
    set_local_weight,
    start_averages,
)
from cogvlm_ft.runtime.watchdog import progress
from cogvlm_ft.safetensors_io import TensorFile, TensorSpec
from cogvlm_ft.terminal import progress_bar

LAYOUT_FILE = "layout.json"
WEIGHT = "weight"
MAX_RANKS = 2**16


@dataclass(frozen=True)
class Layout:
    """What the files of all ranks hold. optimizer_step: updates so far, fewer than steps where some were skipped."""

    world_size: int
    optimizer_step: int
    shapes: dict[str, tuple[int, ...]]

    def save(self, checkpoint: Path) -> None:
        (checkpoint / LAYOUT_FILE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, checkpoint: Path) -> Layout:
        path = checkpoint / LAYOUT_FILE
        try:
            fields = read_again(lambda: read_json(path))
            shapes = {name: tuple(shape) for name, shape in fields.pop("shapes").items()}
            layout = cls(shapes=shapes, **fields)
            numbers = [layout.world_size, layout.optimizer_step, *(size for shape in shapes.values() for size in shape)]
            if not all(type(number) is int and number >= 0 for number in numbers) or layout.world_size > MAX_RANKS:
                raise ValueError(f"expected whole numbers from 0, and at most {MAX_RANKS} ranks")
            return layout
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error!r}") from error


def rank_file(number: int) -> str:
    """Return the path of a rank's file in a checkpoint."""
    return f"ranks/rank-{number:05d}.safetensors"


def held_parameters(engine: Any) -> dict[str, Any]:
    """Return the parameters of a live engine that a checkpoint holds."""
    return checkpointed(engine.module.named_parameters())


def layout_of(engine: Any) -> Layout:
    """Return the layout of a live engine."""
    shapes = {name: tuple(parameter.ds_shape) for name, parameter in held_parameters(engine).items()}
    return Layout(world_size(), optimizer_step(engine), shapes)


def local_specs(engine: Any) -> list[TensorSpec]:
    """Return the specs of what `local_slices` yields."""
    return [
        TensorSpec(f"{kind}/{name}", (stop - start,))
        for name, parameter, kinds in _held(engine)
        for start, stop in [local_range(parameter)]
        for kind in kinds
    ]


def local_slices(engine: Any) -> Iterator[Tensor]:
    """Yield float32[n] for all that this rank holds.

    These are views of the live state where it is fp32 on this device, else copies. For a bf16 weight it is the fp32
    master weight; a frozen one has none.
    """
    for _, parameter, kinds in _held(engine):
        start, stop = local_range(parameter)
        yield local_weight(parameter)[: stop - start]
        for moment in kinds[1:]:
            yield local_moment(parameter, moment)[: stop - start]


def _held(engine: Any) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """Yield (name, parameter, kinds of its slices), always in the same order."""
    kinds: tuple[str, ...] = (WEIGHT,)
    if optimizer_step(engine) > 0:
        kinds = (WEIGHT, *MOMENTS, AVERAGE) if has_averages(engine) else (WEIGHT, *MOMENTS)
    for name, parameter in held_parameters(engine).items():
        yield name, parameter, kinds if parameter.requires_grad else (WEIGHT,)


class SlicedTensor:
    """A tensor whose slices are in the files of the ranks that wrote it."""

    def __init__(self, key: str, shape: tuple[int, ...], files: list[TensorFile]) -> None:
        self.shape = torch.Size(shape)
        self._key = key
        self._pieces: list[tuple[int, int, TensorFile]] = []
        start = 0
        for file in files:
            if key in file.shapes:
                stop = start + math.prod(file.shapes[key])
                self._pieces.append((start, stop, file))
                start = stop
        if start != math.prod(shape):
            where = files[0].path.parent if files else "no file"
            raise CheckpointError(f"{where}: {start} elements of {key}; expected {list(shape)}")

    def read(self, start: int, stop: int) -> Tensor:
        """Return elements start to stop of the flattened tensor, float32[stop - start]."""
        parts = [
            read_again(partial(file.read, self._key, max(start, first) - first, min(stop, last) - first))
            for first, last, file in self._pieces
            if first < stop and start < last
        ]
        return parts[0] if len(parts) == 1 else torch.cat([torch.empty(0), *parts])


def open_slices(checkpoint: Path, kind: str = WEIGHT) -> dict[str, SlicedTensor]:
    """Return every tensor of a kind by parameter name; all but weights exist only for parameters that were trained."""
    layout = Layout.load(checkpoint)
    files = [_open(checkpoint / rank_file(number)) for number in range(layout.world_size)]
    keys = {name: f"{kind}/{name}" for name in layout.shapes}
    return {
        name: SlicedTensor(key, layout.shapes[name], files)
        for name, key in keys.items()
        if kind == WEIGHT or any(key in file.shapes for file in files)
    }


def _open(path: Path) -> TensorFile:
    try:
        return read_again(partial(TensorFile, path))
    except OSError as error:
        if not is_wrong_part(error):
            raise
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def check_averages_kept(checkpoint: Path, ema: float | None) -> None:
    """Raise ConfigError if a run without `train.ema` would resume from a checkpoint that holds running averages."""
    if ema is None and open_slices(checkpoint, AVERAGE):
        raise ConfigError(
            f"train.ema: found null; expected a decay, such as 0.999: the running averages in {checkpoint} would be "
            "lost. Set train.ema, or use another output_dir"
        )


def assign_slices(engine: Any, checkpoint: Path, *, with_optimizer: bool = True) -> None:
    """Read this rank's slices of the checkpoint, whatever number of ranks wrote it. Collective."""
    parameters = held_parameters(engine)
    _check_shapes(checkpoint, Layout.load(checkpoint).shapes, {n: tuple(p.ds_shape) for n, p in parameters.items()})
    with overwriting_state(engine):
        for name, tensor in progress_bar(open_slices(checkpoint).items(), desc="load weights", unit="tensor"):
            set_local_weight(parameters[name], _padded(tensor, parameters[name]))
        if with_optimizer:
            _assign_moments(engine, checkpoint)
        if has_averages(engine):
            _assign_averages(engine, checkpoint)


def _assign_moments(engine: Any, checkpoint: Path) -> None:
    """Read Adam's moments; those of parameters that were frozen before start at zero."""
    step = Layout.load(checkpoint).optimizer_step
    if step == 0:
        return
    reset_moments(engine, step)
    parameters = held_parameters(engine)
    for moment in MOMENTS:
        for name, tensor in open_slices(checkpoint, moment).items():
            if parameters[name].requires_grad:
                set_local_moment(parameters[name], _padded(tensor, parameters[name]), moment)


def _assign_averages(engine: Any, checkpoint: Path) -> None:
    """Read the running averages; those that the checkpoint does not hold start at the weights just read."""
    start_averages(engine)
    parameters = held_parameters(engine)
    for name, tensor in open_slices(checkpoint, AVERAGE).items():
        if parameters[name].requires_grad:
            set_local_moment(parameters[name], _padded(tensor, parameters[name]), AVERAGE)


def _padded(tensor: SlicedTensor, parameter: Any) -> Tensor:
    progress()
    start, stop = local_range(parameter)
    values = torch.zeros(parameter.ds_tensor.numel())
    values[: stop - start] = tensor.read(start, stop)
    return values


def _check_shapes(checkpoint: Path, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    problems = [
        f"{name}: found {found.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if problems:
        raise CheckpointError(
            f"{checkpoint} belongs to another model than model.path and model.image_size; use those of its run, "
            f"or another output_dir:\n  " + "\n  ".join(problems)
        )
