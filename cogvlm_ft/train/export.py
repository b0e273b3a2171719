"""A training checkpoint becomes a model folder with the published names."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.model import CogVLMForCausalLM, load_config
from cogvlm_ft.model.decoder import inverse_frequencies
from cogvlm_ft.model.loading import check_keys, parameter_shapes, save_weights
from cogvlm_ft.runtime.checkpoint import MODEL_FOLDER
from cogvlm_ft.runtime.consolidate import open_weights


def export_checkpoint(checkpoint: Path, out: Path, dtype: torch.dtype) -> None:
    """Write `out` (config, tokenizer, safetensors) aside and rename it when complete; one tensor at a time."""
    if out.exists():
        raise CheckpointError(f"--out {out} exists; take a new folder")
    weights = open_weights(checkpoint)
    config = load_config(checkpoint / MODEL_FOLDER)
    with torch.device("meta"):
        model = CogVLMForCausalLM(config)
    shapes = parameter_shapes(model.named_parameters())
    check_keys(checkpoint, shapes, {name: tuple(tensor.shape) for name, tensor in weights.items()})

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in tqdm(shapes, desc="export", unit="tensor", disable=None):
            yield name, weights[name].contiguous()
        for name, buffer in model.named_buffers():  # the rotary buffers that published files carry
            yield name, inverse_frequencies(2 * len(buffer))

    partial = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint / MODEL_FOLDER, partial)
    config.dtype = dtype
    config.save_pretrained(partial)
    save_weights(partial, tensors(), dtype)
    partial.rename(out)
