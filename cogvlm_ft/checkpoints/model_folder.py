"""Stream a training checkpoint into a model folder: published names, one tensor in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import initialization

from cogvlm_ft.checkpoints.adapters import ADAPTER_FILE, merged_with_base
from cogvlm_ft.checkpoints.checkpoint import MODEL_FOLDER
from cogvlm_ft.checkpoints.choice import TILES_FILE
from cogvlm_ft.checkpoints.consolidate import open_weights
from cogvlm_ft.checkpoints.manifest import read_manifest
from cogvlm_ft.checkpoints.peft_files import open_peft_adapter
from cogvlm_ft.model import CogVLMConfig, CogVLMForCausalLM, load_config
from cogvlm_ft.model.decoder import inverse_frequencies
from cogvlm_ft.model.loading import INDEX_FILE, Weight, check_keys, parameter_shapes, save_weights
from cogvlm_ft.model.preprocess import MEAN, STD
from cogvlm_ft.plain_files import copy_regular, read_json, write_text
from cogvlm_ft.settings import RESIZES

CONFIG_FILE = "config.json"
_OF_WEIGHTS = (INDEX_FILE, "proof.json", TILES_FILE)


def build_meta_model(config: CogVLMConfig) -> CogVLMForCausalLM:
    """Build a model that has names and shapes but no memory."""
    with initialization.no_init_weights(), torch.device("meta"):
        return CogVLMForCausalLM(config).eval().requires_grad_(False)


def open_contents(checkpoint: Path, *, averaged: bool = False) -> dict[str, Weight]:
    """Return every tensor of the model folder by its published name; CheckpointError if the checkpoint is damaged.

    averaged: as in `open_weights`.
    """
    weights = open_weights(checkpoint, averaged=averaged)
    model = build_meta_model(load_config(checkpoint / MODEL_FOLDER))
    shapes = parameter_shapes(model.named_parameters())
    check_keys(checkpoint, shapes, {name: tuple(stored.shape) for name, stored in weights.items()})
    contents: dict[str, Weight] = {name: weights[name] for name in shapes}
    return contents | _rotary_buffers(model)


def _rotary_buffers(model: CogVLMForCausalLM) -> dict[str, Weight]:
    """Return the buffers that published files carry."""
    return {name: inverse_frequencies(2 * len(buffer)) for name, buffer in model.named_buffers()}


def write_model_folder(checkpoint: Path, contents: Mapping[str, Weight], folder: Path, dtype: torch.dtype) -> None:
    """Write config.json, tokenizer and the other model files of the checkpoint, then the weights in `dtype`.

    What servers need besides is added: docs/serving.md.
    """
    folder.mkdir()
    for name in sorted(read_manifest(checkpoint)):
        if Path(name).parent == Path(MODEL_FOLDER) and name != ADAPTER_FILE:
            copy_regular(checkpoint / name, folder / Path(name).name, follow=False)
    write_weights(folder, contents, dtype)


def open_merged(folder: Path, base: Path) -> dict[str, Weight]:
    """Return every tensor of the model folder `base` with an adapter of peft merged, by its published name."""
    config = load_config(base)
    model = build_meta_model(config)
    shapes = parameter_shapes(model.named_parameters())
    adapter = open_peft_adapter(folder, base, shapes)
    weights = merged_with_base(base, adapter.tensors, adapter.scale, config)
    check_keys(base, shapes, {name: tuple(stored.shape) for name, stored in weights.items()})
    contents: dict[str, Weight] = {name: weights[name] for name in shapes}
    return contents | _rotary_buffers(model)


def write_merged_folder(base: Path, contents: Mapping[str, Weight], folder: Path, dtype: torch.dtype) -> None:
    """Write config.json, tokenizer and the other model files of the folder `base`, then the weights in `dtype`."""
    folder.mkdir()
    for path in sorted(base.iterdir()):
        if path.is_file() and path.suffix in (".json", ".model", ".py") and path.name not in _OF_WEIGHTS:
            shutil.copyfile(path, folder / path.name)
    write_weights(folder, contents, dtype)


def write_weights(folder: Path, contents: Mapping[str, Weight], dtype: torch.dtype) -> None:
    """Complete config.json, and write the weights in `dtype`."""
    config = load_config(folder)
    config.dtype = dtype
    config.save_pretrained(folder)
    _write_for_servers(folder, config)
    save_weights(folder, contents.items(), dtype)


def _write_for_servers(folder: Path, config: CogVLMConfig) -> None:
    """Complete config.json for other programs, and write preprocessor_config.json if they can make these inputs."""
    path = folder / CONFIG_FILE
    fields = read_json(path) | {"num_key_value_heads": config.num_attention_heads}
    modules = {str(name).split(".")[0] for name in fields.get("auto_map", {}).values()}
    if not all((folder / f"{module}.py").is_file() for module in modules):
        fields.pop("auto_map")
    write_text(path, json.dumps(fields, indent=2, sort_keys=True) + "\n")
    if getattr(config, "image_resize", RESIZES[0]) == RESIZES[0]:  # others are unknown to CLIPImageProcessor
        write_text(folder / "preprocessor_config.json", json.dumps(_clip_preprocessing(config), indent=2) + "\n")


def _clip_preprocessing(config: CogVLMConfig) -> dict[str, Any]:
    """Describe `preprocess_image` in the terms of transformers' CLIPImageProcessor."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": config.image_size, "width": config.image_size},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
