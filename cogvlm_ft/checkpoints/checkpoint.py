"""Training checkpoints: complete or invisible, and verified before use.

    checkpoints/step-00000120/manifest.json  every file with its size and sha256
                              state.json     TrainState
                              layout.json    what the ranks' files hold
                              model/         config.json and tokenizer: what an export needs
                              ranks/         fp32 weights and Adam's moments, one safetensors file per rank

    checkpoints/evaluated-00000120.json      what its evaluation added to the state: evaluated_step, best

A state is saved before it is evaluated, so that no evaluation can cost what was trained. Everything is written into
`.tmp-step-...` and published by one rename, so a folder named step-* was complete once; its manifest tells whether it
still is. The newest is found by name; no file records it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from cogvlm_ft.checkpoints.manifest import MANIFEST_FILE, find_damage
from cogvlm_ft.checkpoints.reading import read_again, stop_if_unreadable, unreadable
from cogvlm_ft.checkpoints.slices import assign_slices
from cogvlm_ft.errors import CheckpointError, ServerError
from cogvlm_ft.grounding.confidence import KeptBoxes
from cogvlm_ft.plain_files import read_json, replaced_file, sync, sync_open
from cogvlm_ft.run_folder import entries, step_folders, step_name
from cogvlm_ft.runtime.distributed import computed_by_main, from_main, is_main
from cogvlm_ft.settings import CheckpointConfig

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
MODEL_FOLDER = "model"

_KEPT = ("kept_boxes", "averaged_kept_boxes")


@dataclass(frozen=True)
class Best:
    """The best evaluation so far.

    num_since: evaluations since then. monitor: what was compared; values of another monitor do not count.
    """

    value: float
    step: int
    num_since: int = 0
    monitor: str = ""


@dataclass(frozen=True)
class TrainState:
    """The position of a run, as a few lines of JSON.

    samples_consumed: the position in the data; epoch = samples_consumed // num_samples. evaluated_step: the last step
    that was evaluated. rates: `train.lr_scale` and `train.vision_layer_decay`, where they are set. seed: of the order
    of the samples; None in earlier versions. kept_boxes, averaged_kept_boxes: from tiles, as the last evaluation chose
    them for the weights and for their running averages.
    """

    step: int = 0
    epoch: int = 0
    samples_consumed: int = 0
    evaluated_step: int = -1
    best: Best | None = None
    wandb_run_id: str | None = None
    config_sha256: str = ""
    data_sha256: str = ""
    world_size: int = 1
    rates: list[list[Any]] = field(default_factory=list)
    seed: int | None = None
    kept_boxes: KeptBoxes | None = None
    averaged_kept_boxes: KeptBoxes | None = None

    def advanced(self, num_samples: int, epoch: int) -> TrainState:
        """Return the state one step later."""
        return dataclasses.replace(
            self, step=self.step + 1, samples_consumed=self.samples_consumed + num_samples, epoch=epoch
        )


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints that were complete, oldest first."""
    return [path for path in step_folders(folder) if (path / MANIFEST_FILE).is_file()]


def read_state(checkpoint: Path) -> TrainState:
    """Read the state of a checkpoint, its evaluation included; CheckpointError if it cannot be read.

    Raises OSError if the disk or the server does not answer.
    """
    path = checkpoint / STATE_FILE
    try:
        fields = read_again(lambda: read_json(path))
        record = evaluation_record(checkpoint)
        if record.is_file():
            path = record
            fields |= read_again(lambda: read_json(record))
        best = fields.pop("best")
        kept = {name: KeptBoxes(**fields.pop(name)) for name in _KEPT if fields.get(name)}
        return _checked(TrainState(**{**fields, **kept}, best=Best(**best) if best else None))
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _checked(state: TrainState) -> TrainState:
    """Return the state; ValueError if one of its numbers is not a number."""
    numbers = [state.step, state.epoch, state.samples_consumed, state.evaluated_step + 1, state.world_size]
    numbers += [state.best.step, state.best.num_since] if state.best else []
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("expected whole numbers from 0")
    if state.best and not isinstance(state.best.value, (int, float)):
        raise ValueError(f"best: found {state.best.value!r:.40}; expected a number")
    return state


def record_evaluation(folder: Path, state: TrainState) -> None:
    """Write what an evaluation added to the state beside the state's checkpoint, at once or not at all. Rank 0 only."""
    record = evaluation_record(folder / step_name(state.step))
    fields = dataclasses.asdict(state)
    with replaced_file(record, "w") as file:
        json.dump({name: fields[name] for name in ("evaluated_step", "best", *_KEPT)}, file)
        file.flush()
        sync_open(file.fileno())
    sync(folder)


def discard_later_evaluations(folder: Path, step: int) -> None:
    """Delete the records of steps after this one, from which the run continues. Rank 0 only."""
    for record in entries(folder):
        if fnmatch(record.name, "evaluated-*.json") and record > evaluation_record(folder / step_name(step)):
            record.unlink()


def evaluation_record(checkpoint: Path) -> Path:
    """Return where the evaluation of a checkpoint is recorded."""
    return checkpoint.with_name(f"evaluated-{checkpoint.name.removeprefix('step-')}.json")


def newest_intact(folder: Path) -> Path | None:
    """Return the newest checkpoint that is as it was written, or None if there is none at all. Collective.

    Newer ones that are corrupt are renamed, so that they are neither loaded nor counted. Raises CheckpointError if all
    are corrupt, and ServerError, without renaming anything, if one cannot be read at the moment.
    """
    damaged: dict[Path, list[str]] = {}
    found = computed_by_main(lambda: _listed(folder))
    for path in reversed(found):
        problems = find_damage(path) or _misplaced(path)
        if not problems:
            computed_by_main(lambda: _set_aside(list(damaged)))
            return path
        damaged[path] = problems
        if is_main():
            logger.warning("%s is corrupt and skipped: %s", path, "; ".join(problems))
    if damaged:
        listed = "\n  ".join(f"{path.name}: {'; '.join(problems)}" for path, problems in damaged.items())
        raise CheckpointError(
            f"{folder} contains no intact checkpoint; restore one, or use another output_dir to start over:\n  {listed}"
        )
    return None


def _listed(folder: Path) -> list[Path]:
    """Return the checkpoints, whole or not. Rank 0 only. Raises CheckpointError or ServerError."""
    try:
        return read_again(lambda: step_folders(folder))
    except PermissionError as error:
        raise CheckpointError(
            f"{folder}: {error.strerror}; expected a folder that this account can read. Change its permissions"
        ) from None
    except OSError as error:
        raise ServerError(unreadable(folder, error.strerror or str(error))) from None


def _misplaced(checkpoint: Path) -> list[str]:
    """Report a copy under another step's name. Collective."""
    step, unusable, unreadable = -1, "", ""
    if is_main():
        try:
            step = read_state(checkpoint).step
        except CheckpointError as error:
            unusable = str(error)
        except OSError as error:
            unreadable = str(error)
    stop_if_unreadable(checkpoint, unreadable)
    step, unusable = from_main((step, unusable))
    if unusable:
        raise CheckpointError(unusable)
    return [] if checkpoint.name == step_name(step) else [f"{STATE_FILE} is that of step {step}"]


def _set_aside(damaged: list[Path]) -> None:
    """Rename corrupt checkpoints. Rank 0 only."""
    for path in damaged:
        kept = path.with_name(f"damaged-{path.name}")
        if kept.exists():
            shutil.rmtree(path)
        else:
            path.rename(kept)


def load_checkpoint(
    engine: Any, checkpoint: Path, *, with_optimizer: bool = True, is_checked: bool = False
) -> TrainState:
    """Load weights, Adam's moments and the position on any number of ranks. Collective.

    is_checked: its hashes were just compared, as newest_intact does. Raises CheckpointError if it is not intact.
    """
    problems = [] if is_checked else find_damage(checkpoint)
    if problems:
        raise CheckpointError(f"{checkpoint} is corrupt:  {'; '.join(problems)}")
    assign_slices(engine, checkpoint, with_optimizer=with_optimizer)
    return computed_by_main(lambda: read_state(checkpoint))


def prune_checkpoints(folder: Path, settings: CheckpointConfig, best_step: int | None) -> None:
    """Keep the newest `keep_last`, the best, and the first of every `keep_every_steps` steps. Rank 0 only."""
    checkpoints = list_checkpoints(folder)
    kept = {*checkpoints[-settings.keep_last :], *_milestones(checkpoints, settings.keep_every_steps)}
    for path in checkpoints:
        if path not in kept and (best_step is None or path.name != step_name(best_step)):
            doomed = path.with_name(f".tmp-old-{path.name}")
            path.rename(doomed)
            shutil.rmtree(doomed)
            evaluation_record(path).unlink(missing_ok=True)


def _milestones(checkpoints: list[Path], every: int | None) -> list[Path]:
    """Return the first checkpoint at or after each multiple of `every` steps."""
    if every is None:
        return []
    first: dict[int, Path] = {}
    for path in checkpoints:
        first.setdefault(int(path.name.removeprefix("step-")) // every, path)
    return [path for number, path in first.items() if number > 0]


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left half written or half deleted. Rank 0 only."""
    for path in (path for path in entries(folder) if path.name.startswith(".tmp-")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
