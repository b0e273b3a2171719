"""Export a model with quantised linear layers, in a folder that this package loads by itself."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from cogvlm_ft.build import load_whole_model
from cogvlm_ft.checkpoints.adapters import ADAPTER_FILE
from cogvlm_ft.checkpoints.choice import chosen_boxes, model_files, save_kept_boxes
from cogvlm_ft.export.new_folder import new_folder
from cogvlm_ft.model import load_config
from cogvlm_ft.model.loading import INDEX_FILE
from cogvlm_ft.model.quantized import WEIGHT_FORMAT, stored_tensors
from cogvlm_ft.plain_files import copy_regular

_NOT_COPIED = ("*.safetensors", INDEX_FILE, "*.bin", Path(ADAPTER_FILE).name, "proof.json", "README.md")
"""Files that are not copied: the weights, and files that describe them."""


def export_quantized(weights: Path, out: Path, kind: str) -> int:
    """Write a model folder, a checkpoint or merged adapters as `out`, quantised; return the bytes of its weights.

    weights: a model folder or a checkpoint. Never whole in memory before it is quantised. At once or not at all.
    """
    with new_folder(out) as partial:
        partial.mkdir()
        model = load_whole_model(weights, torch.bfloat16, quantized=kind)
        files = model_files(weights)
        for path in sorted(files.iterdir()):
            if path.is_file() and not any(path.match(pattern) for pattern in _NOT_COPIED):
                copy_regular(path, partial / path.name, follow=True)
        save_kept_boxes(chosen_boxes(weights), partial)  # of a checkpoint it is in none of these files
        config = load_config(files)
        config.dtype = torch.bfloat16
        setattr(config, WEIGHT_FORMAT, kind)
        config.save_pretrained(partial)
        tensors = stored_tensors(model)
        save_torch_state_dict(tensors, partial)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
