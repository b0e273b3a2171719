"""Export a training checkpoint as a model folder with the published names, and verify it against the checkpoint."""

from __future__ import annotations

import errno
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from cogvlm_ft.checkpoints.checkpoint import MODEL_FOLDER, list_checkpoints
from cogvlm_ft.checkpoints.choice import chosen_boxes, save_kept_boxes, trained_wording
from cogvlm_ft.checkpoints.model_folder import open_contents, write_model_folder
from cogvlm_ft.config import load_run_config
from cogvlm_ft.errors import CheckpointError, ConfigError
from cogvlm_ft.export.blend import Blend, blended, check_fraction
from cogvlm_ft.export.model_card import write_model_card
from cogvlm_ft.export.new_folder import check_new
from cogvlm_ft.export.verification import Verification, verify_export
from cogvlm_ft.grounding.wording import WORDING_FILE, save_wording
from cogvlm_ft.model.loading import Weight
from cogvlm_ft.plain_files import sync, sync_tree
from cogvlm_ft.run_folder import RunFolder
from cogvlm_ft.settings import Config

logger = logging.getLogger(__name__)

_DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    dtype: torch.dtype,
    *,
    verify: bool = True,
    blend: Blend | None = None,
    averaged: bool = False,
) -> Verification | None:
    """Write `out` (config, tokenizer, safetensors, README.md) under a temporary name, verify it, then rename it.

    Return the result of the verification, which is also in proof.json; None without one. An export that fails the
    verification is kept as `rejected_path(out)`. One tensor is in memory at a time. blend: what to
    write instead of the checkpoint's own weights. averaged: the running averages of `train.ema`, in place of the
    weights.
    """
    if blend:
        check_fraction(blend.fraction)
    check_new(out)
    if not checkpoint.is_dir():
        raise CheckpointError(f"--checkpoint {checkpoint}: no such folder. {_available_checkpoints(checkpoint)}")
    partial = out.with_name(f".tmp-{out.name}")
    with _explained_disk_errors(checkpoint, out), _removed_on_failure(partial):
        contents = open_contents(checkpoint, averaged=averaged)
        contents = blended(contents, blend) if blend else contents
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        check_free_space(out, contents, dtype)
        write_model_folder(checkpoint, contents, partial, dtype)
        wording = trained_wording(checkpoint)
        if wording and not (partial / WORDING_FILE).exists():  # of an earlier version
            save_wording(wording, partial / WORDING_FILE)
        kept = chosen_boxes(checkpoint, averaged=averaged)
        if kept and blend:
            logger.warning("--blend: no evaluation chose which boxes from tiles count for a blend; every box counts")
        else:
            save_kept_boxes(kept, partial)
        result = verify_export(partial, checkpoint / MODEL_FOLDER, contents, dtype) if verify else None
        if result:
            result.save(partial)
        write_model_card(partial, checkpoint, _run_config(checkpoint), name=out.name, blend=blend, averaged=averaged)
        sync_tree(partial)
        if result and result.problems:
            shutil.rmtree(rejected_path(out), ignore_errors=True)
            partial.rename(rejected_path(out))
        else:
            partial.rename(out)
        sync(out.parent)
    return result


def rejected_path(out: Path) -> Path:
    """Return the name under which an export is kept that differs from its checkpoint."""
    return out.with_name(f"{out.name}-not-proven")


def _run_config(checkpoint: Path) -> Config | None:
    """Return the settings of the checkpoint's run; None if they cannot be read."""
    try:
        return load_run_config(RunFolder.containing(checkpoint).config)
    except (ConfigError, OSError, IndexError):
        return None


def check_free_space(out: Path, contents: Mapping[str, Weight], dtype: torch.dtype) -> None:
    """Raise a CheckpointError before any work if the weights cannot fit on the disk of `out`."""
    needed = sum(math.prod(stored.shape) for stored in contents.values()) * dtype.itemsize
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise CheckpointError(
            f"--out {out}: {free / 2**30:.1f} GiB free on this disk; expected {needed / 2**30:.1f} GiB for the "
            "weights. Free some space, use another disk, or --dtype bf16, which needs half of fp32"
        )


@contextmanager
def _removed_on_failure(partial: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def _explained_disk_errors(checkpoint: Path, out: Path) -> Iterator[None]:
    """Turn disk errors inside into CheckpointErrors that say what to do."""
    try:
        yield
    except (OSError, CheckpointError) as error:
        if not checkpoint.is_dir():
            raise CheckpointError(
                f"{checkpoint} was deleted while it was exported: its run keeps the newest checkpoint.keep_last. "
                f"{_available_checkpoints(checkpoint)}"
            ) from error
        if isinstance(error, CheckpointError):
            raise
        if error.errno in _DISK_IS_FULL:
            raise CheckpointError(
                f"--out {out}: no space left ({error.strerror}); {shutil.disk_usage(out.parent).free / 2**30:.1f} GiB "
                "free on this disk. The partial export was removed. Free some space, or use another disk"
            ) from error
        raise CheckpointError(f"{checkpoint} cannot be exported to {out}: {error}") from error


def _available_checkpoints(checkpoint: Path) -> str:
    names = [path.name for path in list_checkpoints(checkpoint.parent)]
    return f"Available: {', '.join(names)}" if names else f"{checkpoint.parent} has no checkpoint"
