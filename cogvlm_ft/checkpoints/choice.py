"""Find the weights that a path refers to: a model folder, a checkpoint, or the best checkpoint of a run folder."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

from cogvlm_ft.checkpoints.checkpoint import MODEL_FOLDER, STATE_FILE, list_checkpoints, read_state
from cogvlm_ft.config import load_config
from cogvlm_ft.errors import CheckpointError, ConfigError
from cogvlm_ft.grounding.confidence import KeptBoxes
from cogvlm_ft.grounding.wording import WORDING_FILE, Wording, load_wording
from cogvlm_ft.plain_files import read_json, write_text
from cogvlm_ft.run_folder import RunFolder, step_name

logger = logging.getLogger(__name__)

CONFIG_FILE, TILES_FILE = "config.json", "tiles.json"


def best_checkpoint(run: Path) -> Path:
    """Return the best checkpoint of a run; the newest one if the model was best before training."""
    checkpoints = list_checkpoints(RunFolder(run).checkpoints)
    if not checkpoints:
        raise CheckpointError(
            f"{RunFolder(run).checkpoints} contains no checkpoint. Give the output_dir of a training run; found {run}"
        )
    best = read_state(checkpoints[-1]).best
    found = [path for path in checkpoints if best is not None and path.name == step_name(best.step)]
    if not found:
        logger.warning("%s: no checkpoint was better than the model before training; this is the last checkpoint", run)
    return found[0] if found else checkpoints[-1]


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder is a training checkpoint."""
    return (path / STATE_FILE).is_file()


def is_run(path: Path) -> bool:
    """Return whether a folder is the output_dir of a run with checkpoints."""
    return bool(list_checkpoints(RunFolder(path).checkpoints))


def find_weights(path: Path, option: str) -> Path:
    """Return a model folder or a checkpoint unchanged, and the best checkpoint of a run folder.

    option: for the CheckpointError.
    """
    if is_checkpoint(path) or (path / CONFIG_FILE).is_file():
        return path
    if is_run(path):
        return best_checkpoint(path)
    what = "a folder without config.json, state.json or checkpoints" if path.is_dir() else "no such folder"
    raise CheckpointError(
        f"{option} {path}: found {what}; expected a model folder, a checkpoint such as "
        "runs/x/checkpoints/step-00000100, or the output_dir of a run"
    )


def model_files(weights: Path) -> Path:
    """Return the folder that holds the config.json, tokenizer and wording of a model folder or a checkpoint."""
    return weights / MODEL_FOLDER if is_checkpoint(weights) else weights


def trained_wording(weights: Path) -> Wording | None:
    """Return the wording that a model folder or a checkpoint was trained with; None if that is not known.

    Checkpoints of earlier versions do not hold it: then it is that of their run's settings.
    """
    saved = model_files(weights) / WORDING_FILE
    if saved.is_file():
        return load_wording(saved)
    if not is_checkpoint(weights):
        return None
    try:
        return load_wording(load_config(RunFolder.containing(weights).config).data.wording)
    except (ConfigError, OSError, IndexError):
        return None


def chosen_boxes(weights: Path, *, averaged: bool = False) -> KeptBoxes | None:
    """Return which boxes from tiles count, as chosen in validation for these weights; None if not chosen.

    Also for an adapter in the files of peft. averaged: for the running averages of a checkpoint.
    """
    if is_checkpoint(weights):
        return _chosen_in(weights, averaged)
    path = weights / TILES_FILE
    if not path.is_file():
        return None
    try:
        kept = KeptBoxes(**read_json(path))
        if 0 <= kept.min_confidence <= 1:
            return kept
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    raise CheckpointError(f"{path}: found min_confidence {kept.min_confidence}; expected 0 to 1")


def _chosen_in(checkpoint: Path, averaged: bool) -> KeptBoxes | None:
    state = read_state(checkpoint)
    kept = state.averaged_kept_boxes if averaged else state.kept_boxes
    if kept and state.evaluated_step != state.step:
        logger.warning(
            "%s: which boxes from tiles count was chosen by the evaluation of step %d; none has chosen it for step %d",
            checkpoint,
            state.evaluated_step,
            state.step,
        )
    if state.kept_boxes and not kept:
        logger.warning("%s: no evaluation chose which boxes from tiles count for the averaged weights", checkpoint)
    return kept


def save_kept_boxes(kept: KeptBoxes | None, folder: Path) -> None:
    """Write what `chosen_boxes` reads from a model folder; nothing for None."""
    if kept is None:
        return
    write_text(folder / TILES_FILE, json.dumps(asdict(kept)) + "\n")
