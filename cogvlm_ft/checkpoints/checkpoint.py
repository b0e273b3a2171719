"""Training checkpoints: complete or invisible, and never believed without a look.

    checkpoints/step-00000120/manifest.json  every file with its size and sha256
                              state.json     TrainState
                              layout.json    what the ranks' files hold
                              model/         config.json and tokenizer: what an export needs
                              ranks/         fp32 weights and Adam's moments, one safetensors file per rank

Everything is written into `.tmp-step-...` and published by one rename, so a folder named step-* was whole once; whether
it still is says the manifest. Which is the newest is seen from the names: no file says so.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvlm_ft.checkpoints.manifest import MANIFEST_FILE, find_damage
from cogvlm_ft.checkpoints.slices import assign_slices
from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.run_folder import step_name
from cogvlm_ft.runtime.distributed import barrier, from_main, is_main
from cogvlm_ft.settings import CheckpointConfig

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
MODEL_FOLDER = "model"


@dataclass(frozen=True)
class Best:
    """The best validation so far."""

    value: float
    step: int
    num_since: int = 0  # evaluations since then
    monitor: str = ""  # what was compared: a value of something else is no rival


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


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were complete, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / MANIFEST_FILE).is_file())


def read_state(checkpoint: Path) -> TrainState:
    try:
        fields = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        best = fields.pop("best")
        return TrainState(**fields, best=Best(**best) if best else None)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint / STATE_FILE} cannot be read: {error}") from error


def newest_intact(folder: Path) -> Path | None:
    """Collective. The newest checkpoint that is as it was written; None if there is none at all.

    Damaged ones that are newer are renamed, so that they are neither taken nor counted. Raises CheckpointError if all
    are damaged.
    """
    damaged: dict[Path, list[str]] = {}
    found = sorted(path for path in folder.glob("step-*") if path.is_dir()) if is_main() else None
    for path in reversed(from_main(found)):
        problems = find_damage(path) or _misplaced(path)
        if not problems:
            _set_aside(list(damaged))
            return path
        damaged[path] = problems
        if is_main():
            logger.warning("%s is damaged and passed over: %s", path, "; ".join(problems))
    if damaged:
        listed = "\n  ".join(f"{path.name}: {'; '.join(problems)}" for path, problems in damaged.items())
        raise CheckpointError(
            f"{folder} holds no intact checkpoint; restore one, or take another output_dir to begin anew:\n  {listed}"
        )
    return None


def _misplaced(checkpoint: Path) -> list[str]:
    """A copy under another step's name."""
    step = read_state(checkpoint).step
    return [] if checkpoint.name == step_name(step) else [f"{STATE_FILE} is that of step {step}"]


def _set_aside(damaged: list[Path]) -> None:
    """Collective."""
    barrier()
    if is_main():
        for path in damaged:
            kept = path.with_name(f"damaged-{path.name}")
            if kept.exists():
                shutil.rmtree(path)
            else:
                path.rename(kept)
    barrier()


def load_checkpoint(
    engine: Any, checkpoint: Path, *, with_optimizer: bool = True, is_checked: bool = False
) -> TrainState:
    """Collective. Weights, Adam's moments and the position, on any number of ranks; CheckpointError if not intact.

    is_checked: its hashes were just compared, as newest_intact does.
    """
    problems = [] if is_checked else find_damage(checkpoint)
    if problems:
        raise CheckpointError(f"{checkpoint} is damaged: {'; '.join(problems)}")
    assign_slices(engine, checkpoint, with_optimizer=with_optimizer)
    return read_state(checkpoint)


def prune_checkpoints(folder: Path, settings: CheckpointConfig, best_step: int | None) -> None:
    """Rank 0. Keep the newest `keep_last`, the best, and the first of every `keep_every_steps` steps."""
    checkpoints = list_checkpoints(folder)
    kept = {*checkpoints[-settings.keep_last :], *_milestones(checkpoints, settings.keep_every_steps)}
    for path in checkpoints:
        if path not in kept and (best_step is None or path.name != step_name(best_step)):
            doomed = path.with_name(f".tmp-old-{path.name}")
            path.rename(doomed)
            shutil.rmtree(doomed)


def _milestones(checkpoints: list[Path], every: int | None) -> list[Path]:
    """The first checkpoint at or after each multiple of `every` steps; never one before the first multiple."""
    if every is None:
        return []
    first: dict[int, Path] = {}
    for path in checkpoints:
        first.setdefault(int(path.name.removeprefix("step-")) // every, path)
    return [path for number, path in first.items() if number > 0]


def remove_leftovers(folder: Path) -> None:
    """Rank 0. What a killed run left half written or half deleted."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
