"""Send the content of a run folder to W&B: images and predictions during training, the whole run afterwards."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path
from typing import Any

from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.evaluate.evaluate import PREDICTIONS_FILE
from cogvlm_ft.evaluate.results import former_evaluation
from cogvlm_ft.grounding.metrics import LOWER_IS_BETTER
from cogvlm_ft.report.gallery import (
    TABLE_COLUMNS,
    Picture,
    choose,
    load_pictures,
    read_predictions,
    save_gallery,
    table_rows,
)
from cogvlm_ft.run_folder import RunFolder
from cogvlm_ft.settings import WANDB_MODES
from cogvlm_ft.terminal import progress_bar
from cogvlm_ft.tracking.metrics_log import read_rows
from cogvlm_ft.tracking.tracker import read_run_file
from cogvlm_ft.tracking.wandb_run import BoxedImage, WandbRun, check_key

logger = logging.getLogger(__name__)

MAX_TABLE_ROWS = 200
BOX_CLASSES = {0: "truth", 1: "right answer", 2: "wrong answer"}


def save_pictures(folder: Path, reader: ShardReader, num_photos: int) -> None:
    """Save the gallery of an evaluation next to its predictions: `num_photos` images of each group."""
    before = former_evaluation(folder)
    try:
        former = read_predictions(before / PREDICTIONS_FILE) if before else []
    except DataError as error:  # images must not end a training run
        logger.warning("no newly lost images: %s", error)
        former = []
    gallery = choose(read_predictions(folder / PREDICTIONS_FILE), former, num_photos)
    save_gallery(gallery, folder, reader)


def show_evaluation(wandb_run: WandbRun, folder: Path, epoch: float) -> None:
    """Log the images and predictions that an evaluation left in its folder. Raises DataError."""
    if not wandb_run.is_recording:
        return
    predictions = read_predictions(folder / PREDICTIONS_FILE)
    pictures = load_pictures(folder, predictions)
    wandb_run.log_pictures(epoch, {group: [boxed_image(each) for each in of] for group, of in pictures.items()})
    wandb_run.log_table(epoch, TABLE_COLUMNS, table_rows(predictions, MAX_TABLE_ROWS))


def boxed_image(picture: Picture) -> BoxedImage:
    """Convert a picture of the gallery; W&B can hide true boxes, right answers and wrong answers."""
    boxes = {
        "truth": [(box, label, 0) for box, label in picture.truth],
        "answers": [(box, label, 1 if is_right else 2) for box, label, is_right in picture.answers],
    }
    return BoxedImage(picture.photo, f"{picture.key}: {picture.caption}", boxes, BOX_CLASSES)


def replay(
    run_folder: Path,
    *,
    mode: str = "auto",
    project: str | None = None,
    entity: str | None = None,
    new_run: bool = False,
) -> WandbRun:
    """Send a run folder to W&B as one run, under the id it trained with; finished when returned.

    new_run: under another id, for a run that W&B already has, completely or in part.
    Raises DataError for files that cannot be read, ConfigError if W&B does not take the run.
    """
    if mode not in WANDB_MODES or mode == "disabled":
        raise ConfigError(f"--mode: found {mode!r}; expected auto, online or offline")
    identity = read_run_file(run_folder)
    rows = read_rows(RunFolder(run_folder).metrics_log)
    identity |= {key: value for key, value in (("project", project), ("entity", entity)) if value is not None}
    if new_run:
        identity["run_id"] = secrets.token_hex(4)
    check_key(mode)
    wandb_run = WandbRun(run_folder, mode=mode, is_new=True, lower_is_better=LOWER_IS_BETTER, **identity)
    advice = "If it already has this run, give --new-run; without a network, --mode offline"
    _check(wandb_run, advice)
    for row in progress_bar(rows, desc="replay", unit="row"):
        _send(wandb_run, run_folder, row)
    wandb_run.finish()
    _check(wandb_run, advice)
    return wandb_run


def _check(wandb_run: WandbRun, advice: str) -> None:
    """Check that W&B accepted everything. Raises ConfigError."""
    if wandb_run.stopped_by is not None:
        raise ConfigError(f"W&B refused the run ({wandb_run.stopped_by}). {advice}")
    if not wandb_run.place:
        raise ConfigError("W&B is switched off: found WANDB_MODE=disabled. Unset it, or give --mode")


def _send(wandb_run: WandbRun, run_folder: Path, row: dict[str, Any]) -> None:
    values = {name: value for name, value in row.items() if name not in ("kind", "step")}
    if row["kind"] == "train":
        wandb_run.log_train(row["step"], values)
    elif row["kind"] == "val":
        epoch = values.pop("epoch")
        wandb_run.log_val(epoch, row["step"], values)
        try:
            show_evaluation(wandb_run, RunFolder(run_folder).evaluation(row["step"]), epoch)
        except DataError as error:  # the curves are useful without it
            logger.warning("%s: sent without images and predictions", error)
    elif row["kind"] == "summary":
        wandb_run.summary(values)


def note_export(run_folder: Path, export: Path, alias: str, *, mode: str = "auto") -> WandbRun:
    """Note an exported model in the W&B run it was trained in: a reference, nothing is uploaded.

    Raises DataError if one of the folders is not what it should be, ConfigError if W&B refuses it.
    """
    weights = sorted(export.glob("*.safetensors"))
    if not weights or not (export / "config.json").exists():
        raise DataError(f"{export}: expected a model folder with config.json and *.safetensors")
    identity = read_run_file(run_folder)
    check_key(mode)
    wandb_run = WandbRun(run_folder, mode=mode, **identity)
    _check(wandb_run, "Without a network, give --mode offline")
    num_bytes = sum(path.stat().st_size for path in export.iterdir() if path.is_file())
    wandb_run.log_export(export, alias, {"num_bytes": num_bytes, "num_weight_files": len(weights)})
    wandb_run.finish()
    _check(wandb_run, "Without a network, give --mode offline")
    return wandb_run
