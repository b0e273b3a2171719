"""A run folder without a training run: a model's weights as the checkpoint that ranks would write, and settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from cogvlm_ft.checkpoints.checkpoint import MODEL_FOLDER, STATE_FILE, TrainState
from cogvlm_ft.checkpoints.manifest import write_manifest
from cogvlm_ft.checkpoints.slices import WEIGHT, Layout, rank_file
from cogvlm_ft.model import CogVLMTokenizer
from cogvlm_ft.model.configuration import CogVLMConfig
from cogvlm_ft.model.loading import StoredTensor, read_whole
from cogvlm_ft.run_folder import step_name
from cogvlm_ft.safetensors_io import TensorSpec, hash_file, write_tensors

STEP = 7


def write_run(
    run: Path,
    config: CogVLMConfig,
    tokenizer: CogVLMTokenizer,
    weights: Iterable[tuple[str, StoredTensor | Tensor]],
    settings: dict[str, object],
    num_ranks: int = 2,
) -> Path:
    """Write the run folder without Adam's moments and return its checkpoint. settings: dotted names and values."""
    checkpoint = run / "checkpoints" / step_name(STEP)
    (checkpoint / MODEL_FOLDER).mkdir(parents=True)
    config.architectures = ["CogVLMForCausalLM"]
    config.save_pretrained(checkpoint / MODEL_FOLDER)
    tokenizer.save(checkpoint / MODEL_FOLDER)
    OmegaConf.save(OmegaConf.from_dotlist([f"{key}={value}" for key, value in settings.items()]), run / "config.yaml")
    state = TrainState(step=STEP, epoch=1, samples_consumed=56, data_sha256="ab" * 32, world_size=num_ranks)
    (checkpoint / STATE_FILE).write_text(json.dumps(dataclasses.asdict(state)))
    contents = dict(weights)
    Layout(num_ranks, STEP, {name: tuple(stored.shape) for name, stored in contents.items()}).save(checkpoint)
    sizes = {name: -(-stored.shape.numel() // num_ranks) for name, stored in contents.items()}
    for rank in range(num_ranks):
        path = checkpoint / rank_file(rank)
        path.parent.mkdir(exist_ok=True)
        lengths = {n: min(sizes[n], max(0, s.shape.numel() - rank * sizes[n])) for n, s in contents.items()}
        specs = [TensorSpec(f"{WEIGHT}/{name}", (length,)) for name, length in lengths.items()]
        write_tensors(path, specs, _slices(contents, sizes, rank))
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file()]
    write_manifest(checkpoint, {file.relative_to(checkpoint).as_posix(): hash_file(file) for file in files})
    return checkpoint


def _slices(contents: dict[str, StoredTensor | Tensor], sizes: dict[str, int], rank: int) -> Iterator[Tensor]:
    for name, stored in contents.items():
        flat = read_whole(stored, torch.float32).reshape(-1)
        yield flat[rank * sizes[name] : (rank + 1) * sizes[name]]
