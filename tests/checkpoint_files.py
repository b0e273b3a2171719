"""Whole checkpoints without an engine: slices of generated tensors in the files and manifest of a real one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from cogvlm_ft.checkpoints.checkpoint import MODEL_FOLDER, STATE_FILE, TrainState
from cogvlm_ft.checkpoints.manifest import write_manifest
from cogvlm_ft.checkpoints.slices import MOMENTS, WEIGHT, Layout, rank_file
from cogvlm_ft.run_folder import step_name
from cogvlm_ft.safetensors_io import TensorSpec, hash_file, write_tensors

SHAPES = {"embed": (7, 3), "norm": (5,), "scale": (1,)}


def made_tensor(kind: str, name: str, step: int) -> torch.Tensor:
    """Return a random tensor that depends only on the arguments."""
    seed = sum(f"{kind}/{name}".encode()) * 1000 + step
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed))


def write_checkpoint(folder: Path, step: int, state: TrainState | None = None, num_ranks: int = 2) -> Path:
    """Write a checkpoint as CheckpointSaver does and return its path."""
    path = folder / step_name(step)
    (path / MODEL_FOLDER).mkdir(parents=True)
    (path / MODEL_FOLDER / "config.json").write_text('{"hidden_size": 3}\n')
    state = dataclasses.replace(state or TrainState(), step=step, world_size=num_ranks)
    (path / STATE_FILE).write_text(json.dumps(dataclasses.asdict(state)))
    Layout(num_ranks, step, SHAPES).save(path)
    for rank in range(num_ranks):
        slices = {}
        for kind in (WEIGHT, *MOMENTS):
            for name in SHAPES:
                flat = made_tensor(kind, name, step).flatten()
                size = -(-len(flat) // num_ranks)
                slices[f"{kind}/{name}"] = flat[rank * size : (rank + 1) * size]
        (path / rank_file(rank)).parent.mkdir(exist_ok=True)
        specs = [TensorSpec(key, tuple(part.shape)) for key, part in slices.items()]
        write_tensors(path / rank_file(rank), specs, slices.values())
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    write_manifest(path, {file.relative_to(path).as_posix(): hash_file(file) for file in files})
    return path
