"""Export the adapters of a checkpoint alone, in the files of the peft package; and merge such files into a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from cogvlm_ft.checkpoints.adapters import AdapterRecord
from cogvlm_ft.checkpoints.consolidate import open_last_or_average
from cogvlm_ft.checkpoints.manifest import find_damage
from cogvlm_ft.checkpoints.model_folder import open_merged, write_merged_folder
from cogvlm_ft.checkpoints.peft_files import BASE_FILE, WEIGHTS_FILE
from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.export.export import check_free_space
from cogvlm_ft.model.adapters import name_in_peft_file, peft_config
from cogvlm_ft.model.loading import read_whole
from cogvlm_ft.plain_files import sync, sync_tree, write_text
from cogvlm_ft.safetensors_io import TensorSpec, write_tensors


def export_merged(folder: Path, base: Path, out: Path, dtype: torch.dtype) -> int:
    """Write the model folder `base` with an adapter of peft merged to `out`; return the number of tensors.

    One tensor is in memory at a time. At once or not at all.
    """
    if out.exists():
        raise CheckpointError(f"--out {out} exists; expected a new folder. Choose another name")
    contents = open_merged(folder, base)
    out.parent.mkdir(parents=True, exist_ok=True)
    check_free_space(out, contents, dtype)
    partial = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    write_merged_folder(base, contents, partial, dtype)
    sync_tree(partial)
    partial.rename(out)
    sync(out.parent)
    return len(contents)


def export_adapter(checkpoint: Path, out: Path, *, averaged: bool = False) -> int:
    """Write `out` for `PeftModel.from_pretrained(model, out)`; return the number of tensors. At once or not at all.

    averaged: the running averages of `train.ema`, in place of the weights.
    """
    if out.exists():
        raise CheckpointError(f"--out {out} exists; expected a new folder. Choose another name")
    damage = find_damage(checkpoint)
    if damage:
        raise CheckpointError(f"{checkpoint} is corrupt:  {'; '.join(damage)}")
    record = AdapterRecord.load(checkpoint)
    if record is None:
        raise CheckpointError(f"--adapter: {checkpoint} holds a whole model; expected adapters. Leave --adapter out")
    partial = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    config = peft_config(record.settings, Path(record.base).name)
    config.inference_mode = True
    config.save_pretrained(partial)
    write_text(partial / BASE_FILE, json.dumps({"name": Path(record.base).name, "sha256": record.base_sha256}) + "\n")
    factors = open_last_or_average(checkpoint, averaged=averaged)
    specs = [TensorSpec(name_in_peft_file(name), tuple(factor.shape)) for name, factor in factors.items()]
    write_tensors(partial / WEIGHTS_FILE, specs, (read_whole(each, torch.float32) for each in factors.values()))
    sync_tree(partial)
    partial.rename(out)
    sync(out.parent)
    return len(specs)
