"""Stream a training checkpoint into a model folder: published names, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import initialization

from cogvlm_ft.checkpoints.checkpoint import MODEL_FOLDER
from cogvlm_ft.checkpoints.consolidate import open_weights
from cogvlm_ft.checkpoints.manifest import read_manifest
from cogvlm_ft.model import CogVLMConfig, CogVLMForCausalLM, load_config
from cogvlm_ft.model.decoder import inverse_frequencies
from cogvlm_ft.model.loading import Weight, check_keys, parameter_shapes, save_weights
from cogvlm_ft.plain_files import copy_regular


def build_meta_model(config: CogVLMConfig) -> CogVLMForCausalLM:
    """Build a model that has names and shapes but no memory."""
    with initialization.no_init_weights(), torch.device("meta"):
        return CogVLMForCausalLM(config).eval().requires_grad_(False)


def open_contents(checkpoint: Path) -> dict[str, Weight]:
    """Return every tensor of the model folder by its published name; CheckpointError if the checkpoint is damaged."""
    weights = open_weights(checkpoint)
    model = build_meta_model(load_config(checkpoint / MODEL_FOLDER))
    shapes = parameter_shapes(model.named_parameters())
    check_keys(checkpoint, shapes, {name: tuple(stored.shape) for name, stored in weights.items()})
    contents: dict[str, Weight] = {name: weights[name] for name in shapes}
    for name, buffer in model.named_buffers():  # the rotary buffers that published files carry
        contents[name] = inverse_frequencies(2 * len(buffer))
    return contents


def write_model_folder(checkpoint: Path, contents: Mapping[str, Weight], folder: Path, dtype: torch.dtype) -> None:
    """Write config.json, tokenizer and the other model files of the checkpoint, then the weights in `dtype`."""
    folder.mkdir()
    for name in sorted(read_manifest(checkpoint)):
        if Path(name).parent == Path(MODEL_FOLDER):
            copy_regular(checkpoint / name, folder / Path(name).name, follow=False)
    config = load_config(folder)
    config.dtype = dtype
    config.save_pretrained(folder)
    save_weights(folder, contents.items(), dtype)
