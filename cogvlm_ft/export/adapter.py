"""Export the adapters of a checkpoint alone, in the files of the peft package; and merge such files into a model."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from cogvlm_ft.checkpoints.adapters import AdapterRecord
from cogvlm_ft.checkpoints.choice import chosen_boxes, save_kept_boxes, trained_wording
from cogvlm_ft.checkpoints.consolidate import open_last_or_average
from cogvlm_ft.checkpoints.manifest import find_damage
from cogvlm_ft.checkpoints.model_folder import open_merged, write_merged_folder
from cogvlm_ft.checkpoints.peft_files import BASE_FILE, WEIGHTS_FILE
from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.export.export import check_free_space
from cogvlm_ft.export.new_folder import new_folder
from cogvlm_ft.grounding.wording import WORDING_FILE, save_wording
from cogvlm_ft.model.adapters import name_in_peft_file, peft_config
from cogvlm_ft.model.loading import read_whole
from cogvlm_ft.plain_files import write_text
from cogvlm_ft.safetensors_io import TensorSpec, write_tensors


def export_merged(folder: Path, base: Path, out: Path, dtype: torch.dtype) -> int:
    """Write the model folder `base` with an adapter of peft merged to `out`; return the number of tensors.

    One tensor is in memory at a time. At once or not at all.
    """
    with new_folder(out) as partial:
        contents = open_merged(folder, base)
        check_free_space(out, contents, dtype)
        write_merged_folder(base, contents, partial, dtype)
        _save_how_to_ask(folder, partial)
    return len(contents)


def _save_how_to_ask(weights: Path, folder: Path, *, averaged: bool = False) -> None:
    """Write the wording of the training and which boxes from tiles count, where they are known."""
    wording = trained_wording(weights)
    if wording:
        save_wording(wording, folder / WORDING_FILE)
    save_kept_boxes(chosen_boxes(weights, averaged=averaged), folder)


def export_adapter(checkpoint: Path, out: Path, *, averaged: bool = False) -> int:
    """Write `out` for `PeftModel.from_pretrained(model, out)`; return the number of tensors. At once or not at all.

    averaged: the running averages of `train.ema`, in place of the weights.
    """
    with new_folder(out) as partial:
        damage = find_damage(checkpoint)
        if damage:
            raise CheckpointError(f"{checkpoint} is corrupt:  {'; '.join(damage)}")
        record = AdapterRecord.load(checkpoint)
        if record is None:
            raise CheckpointError(f"--adapter: {checkpoint} holds a whole model; expected adapters. Omit --adapter")
        partial.mkdir()
        config = peft_config(record.settings, Path(record.base).name)
        config.inference_mode = True
        config.save_pretrained(partial)
        base = {"name": Path(record.base).name, "sha256": record.base_sha256}
        write_text(partial / BASE_FILE, json.dumps(base) + "\n")
        _save_how_to_ask(checkpoint, partial, averaged=averaged)
        factors = open_last_or_average(checkpoint, averaged=averaged)
        specs = [TensorSpec(name_in_peft_file(name), tuple(factor.shape)) for name, factor in factors.items()]
        write_tensors(partial / WEIGHTS_FILE, specs, (read_whole(each, torch.float32) for each in factors.values()))
    return len(specs)
