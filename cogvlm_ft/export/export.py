"""A training checkpoint becomes a model folder with the published names, which is then compared with its source."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from cogvlm_ft.checkpoints.checkpoint import MODEL_FOLDER, list_checkpoints
from cogvlm_ft.checkpoints.consolidate import open_weights
from cogvlm_ft.config import load_config
from cogvlm_ft.errors import CheckpointError, ConfigError
from cogvlm_ft.export.model_card import write_model_card
from cogvlm_ft.export.proof_samples import read_samples
from cogvlm_ft.export.verification import Proof, prove_export
from cogvlm_ft.model import CogVLMTokenizer
from cogvlm_ft.model import load_config as load_model_config
from cogvlm_ft.model.decoder import inverse_frequencies
from cogvlm_ft.model.loading import Weight, check_keys, parameter_shapes, save_weights
from cogvlm_ft.model.streamed import meta_model
from cogvlm_ft.run_folder import RunFolder
from cogvlm_ft.safetensors_io import sync, sync_tree
from cogvlm_ft.settings import Config

PROOF_FILE = "proof.json"
_DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def export_checkpoint(checkpoint: Path, out: Path, dtype: torch.dtype, *, num_samples: int = 0) -> Proof | None:
    """Write `out` (config, tokenizer, safetensors, README.md) aside, prove it, and rename it when it is whole.

    num_samples: of the proof, which is returned and also written to proof.json; 0: none. An export that fails it is
    kept as `rejected_path(out)`. Memory holds one tensor, and in the proof one module and what it computes.
    """
    if out.exists():
        raise CheckpointError(f"--out {out} exists; take a new folder")
    if not checkpoint.is_dir():
        raise CheckpointError(f"--checkpoint {checkpoint}: no such folder. {_others(checkpoint)}")
    partial = out.with_name(f".tmp-{out.name}")
    with _told_clearly(checkpoint, out), _nothing_left_behind(partial):
        contents = checkpoint_contents(checkpoint)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        check_room(out, contents, dtype)
        write_model(checkpoint, contents, partial, dtype)
        run_config = _run_config(checkpoint)
        proof = _prove(checkpoint, contents, partial, dtype, run_config, num_samples) if num_samples else None
        write_model_card(partial, checkpoint, run_config, proof, name=out.name)
        sync_tree(partial)
        if proof and proof.problems:
            shutil.rmtree(rejected_path(out), ignore_errors=True)
            partial.rename(rejected_path(out))
        else:
            partial.rename(out)
        sync(out.parent)
    return proof


def rejected_path(out: Path) -> Path:
    """Where an export lies that is not what its checkpoint is."""
    return out.with_name(f"{out.name}-not-proven")


def checkpoint_contents(checkpoint: Path) -> dict[str, Weight]:
    """Every tensor of an export by its published name; CheckpointError if the checkpoint is not intact."""
    weights = open_weights(checkpoint)
    model = meta_model(load_model_config(checkpoint / MODEL_FOLDER))
    shapes = parameter_shapes(model.named_parameters())
    check_keys(checkpoint, shapes, {name: tuple(stored.shape) for name, stored in weights.items()})
    contents: dict[str, Weight] = {name: weights[name] for name in shapes}
    for name, buffer in model.named_buffers():  # the rotary buffers that published files carry
        contents[name] = inverse_frequencies(2 * len(buffer))
    return contents


def write_model(checkpoint: Path, contents: Mapping[str, Weight], folder: Path, dtype: torch.dtype) -> None:
    """config.json, tokenizer and what else the checkpoint has beside its weights, then these."""
    folder.mkdir()
    for path in (checkpoint / MODEL_FOLDER).iterdir():
        shutil.copyfile(path, folder / path.name)
    config = load_model_config(folder)
    config.dtype = dtype
    config.save_pretrained(folder)
    save_weights(folder, contents.items(), dtype)


def _prove(
    checkpoint: Path,
    contents: Mapping[str, Weight],
    folder: Path,
    dtype: torch.dtype,
    run_config: Config | None,
    num_samples: int,
) -> Proof:
    tokenizer = CogVLMTokenizer.from_folder(checkpoint / MODEL_FOLDER)
    samples = read_samples(run_config, load_model_config(checkpoint / MODEL_FOLDER), tokenizer, num_samples)
    proof = prove_export(folder, checkpoint / MODEL_FOLDER, contents, dtype, samples)
    text = json.dumps(dataclasses.asdict(proof), indent=2, ensure_ascii=False)
    (folder / PROOF_FILE).write_text(text + "\n", encoding="utf-8")
    return proof


def _run_config(checkpoint: Path) -> Config | None:
    """The settings of the run that the checkpoint lies in; None if they are not there."""
    try:
        return load_config(RunFolder.containing(checkpoint).config)
    except (ConfigError, OSError, IndexError):
        return None


def check_room(out: Path, contents: Mapping[str, Weight], dtype: torch.dtype) -> None:
    """Before hours of work: CheckpointError if the weights cannot fit where `out` will be."""
    wanted = sum(math.prod(stored.shape) for stored in contents.values()) * dtype.itemsize
    free = shutil.disk_usage(out.parent).free
    if free < wanted:
        raise CheckpointError(
            f"--out {out}: {free / 2**30:.1f} GiB are free there, the weights take {wanted / 2**30:.1f} GiB; "
            "make room, take another disk, or --dtype bf16, which takes half of fp32"
        )


@contextmanager
def _nothing_left_behind(partial: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def _told_clearly(checkpoint: Path, out: Path) -> Iterator[None]:
    """What goes wrong on disks while an export is under way, as a CheckpointError that says what to do."""
    try:
        yield
    except (OSError, CheckpointError) as error:
        if not checkpoint.is_dir():
            raise CheckpointError(
                f"{checkpoint} was deleted while it was exported: its training keeps checkpoint.keep_last of them. "
                f"{_others(checkpoint)}"
            ) from error
        if isinstance(error, CheckpointError):
            raise
        if error.errno in _DISK_IS_FULL:
            raise CheckpointError(
                f"--out {out}: no room ({error.strerror}); {shutil.disk_usage(out.parent).free / 2**30:.1f} GiB are "
                "free there. Nothing was left behind; make room, or take another disk"
            ) from error
        raise CheckpointError(f"{checkpoint} cannot be exported to {out}: {error}") from error


def _others(checkpoint: Path) -> str:
    names = [path.name for path in list_checkpoints(checkpoint.parent)]
    return f"There are: {', '.join(names)}" if names else f"{checkpoint.parent} holds no checkpoint"
