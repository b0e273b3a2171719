"""Training checkpoints: complete or invisible.

    checkpoints/step-00000120/state.json     TrainState
                              model/         config.json and tokenizer: what an export needs
                              zero3/         DeepSpeed's files, one set per rank

Everything is written into `.tmp-step-...` and published by one rename, so a folder named step-* is whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.runtime.distributed import barrier, is_main, world_size

ZERO_TAG = "zero3"
STATE_FILE = "state.json"
MODEL_FOLDER = "model"


@dataclass(frozen=True)
class Best:
    """The best validation so far."""

    value: float
    step: int
    num_since: int = 0  # evaluations since then


@dataclass(frozen=True)
class TrainState:
    """Where a run stands; all of it fits in a few lines of JSON.

    samples_consumed is the position in the data: epoch = samples_consumed // num_samples.
    """

    step: int = 0
    epoch: int = 0
    samples_consumed: int = 0
    evaluated_step: int = -1  # the last step that was evaluated
    best: Best | None = None
    wandb_run_id: str | None = None
    config_sha256: str = ""
    data_sha256: str = ""
    world_size: int = 1

    def advanced(self, num_samples: int, epoch: int) -> TrainState:
        """One step later."""
        return dataclasses.replace(
            self, step=self.step + 1, samples_consumed=self.samples_consumed + num_samples, epoch=epoch
        )


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE_FILE).is_file())


def read_state(checkpoint: Path) -> TrainState:
    try:
        fields = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        best = fields.pop("best")
        return TrainState(**fields, best=Best(**best) if best else None)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint / STATE_FILE} cannot be read: {error}") from error


def save_checkpoint(engine: Any, folder: Path, state: TrainState, save_model_files: Callable[[Path], None]) -> Path:
    """Collective. `save_model_files(path)` writes config and tokenizer; rank 0 calls it."""
    final = folder / checkpoint_name(state.step)
    partial = folder / f".tmp-{final.name}"
    if is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    engine.save_checkpoint(str(partial), tag=ZERO_TAG, save_latest=False)
    barrier()
    if is_main():
        (partial / MODEL_FOLDER).mkdir()
        save_model_files(partial / MODEL_FOLDER)
        state = dataclasses.replace(state, world_size=world_size())
        (partial / STATE_FILE).write_text(json.dumps(dataclasses.asdict(state), indent=2) + "\n", encoding="utf-8")
        _sync_tree(partial)
        if final.exists():  # left by an earlier attempt that went further than the checkpoint this run resumed from
            shutil.rmtree(final)
        partial.rename(final)
        _sync(folder)
    barrier()
    return final


def load_checkpoint(engine: Any, checkpoint: Path) -> TrainState:
    """Collective. Weights, optimizer and position; the world size must be the one that wrote it."""
    state = read_state(checkpoint)
    if state.world_size != world_size():
        raise CheckpointError(
            f"{checkpoint} was written by {state.world_size} ranks and this run has {world_size()}: "
            f"start it with {state.world_size} ranks, or export the checkpoint and train from the export"
        )
    loaded, _ = engine.load_checkpoint(str(checkpoint), tag=ZERO_TAG)
    if loaded is None:
        raise CheckpointError(f"{checkpoint / ZERO_TAG} holds no DeepSpeed checkpoint")
    return state


def prune_checkpoints(folder: Path, keep_last: int, best_step: int | None) -> None:
    """Rank 0. Delete all but the newest `keep_last` and the best."""
    for path in list_checkpoints(folder)[:-keep_last]:
        if best_step is None or path.name != checkpoint_name(best_step):
            doomed = path.with_name(f".tmp-old-{path.name}")
            path.rename(doomed)
            shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Rank 0. What a killed run left half written or half deleted."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)
