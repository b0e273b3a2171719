"""Model folders from and to checkpoints of the official repository. At once or not at all."""

from __future__ import annotations

from pathlib import Path

import torch

from cogvlm_ft.checkpoints.choice import find_weights, is_checkpoint, model_files
from cogvlm_ft.checkpoints.consolidate import open_weights
from cogvlm_ft.checkpoints.model_folder import build_meta_model
from cogvlm_ft.checkpoints.sat import open_sat, write_sat
from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.export.export import check_free_space
from cogvlm_ft.export.new_folder import new_folder
from cogvlm_ft.model import load_config
from cogvlm_ft.model.loading import StoredTensor, check_keys, open_tensors, parameter_shapes, save_weights
from cogvlm_ft.plain_files import copy_regular

_COPIED = ("*.json", "*.model", "*.py", "*.yaml")


def from_sat(sat: Path, files: Path, out: Path, dtype: torch.dtype) -> int:
    """Write a model folder; return the number of its tensors. files: where config.json and the tokenizer come from."""
    config = load_config(files)
    if not (files / "tokenizer.model").is_file():
        raise CheckpointError(f"--files {files}: found no tokenizer.model; expected a published model folder")
    weights = open_sat(sat, _shapes(files))
    with new_folder(out) as partial:
        check_free_space(out, weights, dtype)
        partial.mkdir()
        for path in sorted(each for pattern in _COPIED for each in files.glob(pattern)):
            if not path.name.endswith(".index.json"):
                copy_regular(path, partial / path.name, follow=True)
        config.dtype = dtype
        config.save_pretrained(partial)
        save_weights(partial, weights.items(), dtype)
    return len(weights)


def to_sat(model: Path, out: Path, dtype: torch.dtype) -> int:
    """Write a SAT folder with the weights of a model folder or a checkpoint; return the number of its tensors."""
    source = find_weights(model, "--model")
    weights: dict[str, StoredTensor] = open_weights(source) if is_checkpoint(source) else dict(open_tensors(source))
    weights = {name: weight for name, weight in weights.items() if not name.endswith(".inv_freq")}
    shapes = _shapes(model_files(source))
    check_keys(source, shapes, {name: tuple(weight.shape) for name, weight in weights.items()})
    with new_folder(out) as partial:
        check_free_space(out, weights, dtype)
        write_sat(partial, {name: weights[name] for name in shapes}, dtype)
    return len(shapes)


def _shapes(files: Path) -> dict[str, tuple[int, ...]]:
    return parameter_shapes(build_meta_model(load_config(files)).named_parameters())
