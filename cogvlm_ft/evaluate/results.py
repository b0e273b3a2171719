"""Load what a run or an evaluation left in its folder, for reports."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from cogvlm_ft.data.frames import photo_frame
from cogvlm_ft.errors import DataError
from cogvlm_ft.evaluate.evaluate import ABOUT, CURVES_FILE, METRICS_FILE, PREDICTIONS_FILE
from cogvlm_ft.grounding.ceiling import best_answer_iou
from cogvlm_ft.grounding.metrics import HIT, AnswerScore
from cogvlm_ft.grounding.prediction import Prediction, score_of
from cogvlm_ft.grounding.protocols import OURS, PROTOCOLS, Protocol
from cogvlm_ft.plain_files import json_lines, read_json
from cogvlm_ft.run_folder import RunFolder, step_folders
from cogvlm_ft.tracking.metrics_log import Row, read_rows
from cogvlm_ft.tracking.provenance import without_passwords
from cogvlm_ft.tracking.sample_losses import HighLoss, find_high_losses, read_sample_losses
from cogvlm_ft.tracking.tracker import read_run_file

logger = logging.getLogger(__name__)

NUM_SUSPECTS = 12
_MAX_CONFIG = 20_000  # characters

_UNKNOWN: dict[str, Any] = {
    "key": "",
    "turn": 0,
    "prompt": "",
    "answer": "",
    "truth": "",
    "boxes_xyxy": None,
    "truth_boxes_xyxy": None,
    "image_size_px": (0, 0),
    "score": None,
}
"""Defaults of fields that are missing in older files."""


@dataclass(frozen=True)
class Results:
    """The files of an evaluation. metrics: flat, a group's with `/group=value`. about: weights, data, scoring.

    curves: grounding.breakdown.Summary; empty where none were recorded.
    """

    folder: Path
    metrics: dict[str, float]
    about: dict[str, Any]
    curves: dict[str, Any]
    predictions: list[Prediction]

    @property
    def protocol(self) -> Protocol:
        return PROTOCOLS.get(str(self.about.get("protocol")), OURS)


@dataclass(frozen=True)
class Report:
    """All that the page shows. former: the evaluation before, if there is one. rows: of metrics.jsonl.

    high_losses: training samples; None = not recorded. facts: other facts of the run, by name.
    blends: scores of blends with the model at the start, by fraction.
    """

    name: str
    results: Results
    former: Results | None = None
    rows: list[Row] = field(default_factory=list)
    high_losses: list[HighLoss] | None = None
    config: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    blends: list[Row] = field(default_factory=list)


def find_evaluation(folder: Path, step: int | None = None) -> Path:
    """Find the evaluation's folder: of a run the last one, or that at a step; else the folder. Raises DataError."""
    if step is None and (folder / PREDICTIONS_FILE).is_file():
        return folder
    found = [path for path in step_folders(RunFolder(folder).evaluations) if (path / PREDICTIONS_FILE).is_file()]
    steps = {int(path.name.partition("-")[2]): path for path in found}
    if not steps or step not in (None, *steps):
        expected = f"an evaluation at step {step}" if step is not None else "a run with evaluations, or an evaluation"
        there = f"those at {', '.join(map(str, steps))}" if steps else f"no step-*/{PREDICTIONS_FILE}"
        raise DataError(f"{folder}: found {there}; expected {expected}")
    return found[-1] if step is None else steps[step]


def former_evaluation(folder: Path) -> Path | None:
    """Find the evaluation of the same run before that in `folder` (.../step-00000120)."""
    return max((path for path in step_folders(folder.parent) if path.name < folder.name), default=None)


def load_report(folder: Path, run_folder: Path | None = None) -> Report:
    """Load all that the page shows; missing parts of a run are left out. Raises DataError for the evaluation."""
    before = former_evaluation(folder) if run_folder else None
    report = Report(
        name=RunFolder(run_folder or folder).title,
        results=load_results(folder),
        former=_readable_results(before) if before and (before / PREDICTIONS_FILE).exists() else None,
    )
    if run_folder is None:
        return report
    losses = read_sample_losses(run_folder)
    run = RunFolder(run_folder)
    return replace(
        report,
        rows=read_rows(run.metrics_log) if run.metrics_log.exists() else [],
        high_losses=find_high_losses(losses, NUM_SUSPECTS) if len(losses) > 1 else None,
        config=without_passwords(run.config.read_text(encoding="utf-8")[:_MAX_CONFIG]) if run.config.exists() else "",
        facts=_run_facts(run),
        blends=_read_blends(run.blends),
    )


def _read_blends(path: Path) -> list[Row]:
    """Read the scores of blends; empty if there is no such file."""
    if not path.is_file():
        return []
    try:
        rows = [{name: float(value) for name, value in row.items()} for row in read_json(path)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: {error!r}; expected the scores of launch/blend.py. Delete it") from None
    return list[Row](rows)


def _run_facts(run: RunFolder) -> dict[str, Any]:
    """Return the facts in run.json beside the settings: command, code, hashes."""
    if not run.run_file.exists():
        return {}
    config = read_run_file(run.path)["config"]
    names = ("command", "code", "world_size", "num_samples", "config_sha256", "data_sha256", "val_data_sha256")
    return {name: config[name] for name in names if config.get(name) is not None}


def load_results(folder: Path) -> Results:
    """Load the files of an evaluation. Raises DataError."""
    metrics = dict(_read_json(folder / METRICS_FILE, {}))
    about = metrics.pop(ABOUT, None) or {}
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
    curves = dict(_read_json(folder / CURVES_FILE, {}))
    return Results(folder, numbers, dict(about), curves, read_predictions(folder / PREDICTIONS_FILE))


def _readable_results(folder: Path) -> Results | None:
    """Load what `load_results` does; None with a warning if a full disk or a power failure has left half of it."""
    try:
        return load_results(folder)
    except DataError as error:
        logger.warning("%s; the report compares with no former evaluation", error)
        return None


def _read_json(path: Path, default: Any) -> Any:
    if not path.exists():
        return default
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error!r}); expected the JSON that an evaluation writes") from None


def read_predictions(path: Path) -> list[Prediction]:
    """Read predictions, also of older evaluations, which lack some fields. Raises DataError."""
    try:
        return [_prediction(row) for row in json_lines(path)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({error!r}); expected the predictions.jsonl of an evaluation") from None


def _prediction(row: dict[str, Any]) -> Prediction:
    known = {each.name for each in fields(Prediction)}
    values = {**_UNKNOWN, **{name: value for name, value in row.items() if name in known}}
    if values["score"] is not None:
        of_score = {each.name for each in fields(AnswerScore)}
        values["score"] = AnswerScore(**{name: value for name, value in values["score"].items() if name in of_score})
    return Prediction(**values)


def ceiling_of(prediction: Prediction, protocol: Protocol = OURS) -> float | None:
    """Return the best IoU that box text allows for these boxes; None where none are expected."""
    truth = prediction.truth_boxes_xyxy
    if not truth or min(prediction.image_size_px) < 1:
        return None
    photo = (int(prediction.image_size_px[0]), int(prediction.image_size_px[1]))
    is_whole = tuple(prediction.frame_px) in ((0, 0), photo)
    frame = photo_frame(photo, "squash" if is_whole else "letterbox")
    boxes = frame.apply_boxes([(x0, y0, x1, y1) for x0, y0, x1, y1 in truth])
    return best_answer_iou(boxes, frame.size_px, protocol)


@dataclass(frozen=True)
class Gallery:
    """Answers to look at, at most one per image in a group. newly_*: compared with the evaluation before."""

    best: list[Prediction]
    worst: list[Prediction]
    newly_right: list[Prediction]
    newly_wrong: list[Prediction]


def choose_answers(now: Sequence[Prediction], former: Sequence[Prediction], num_photos: int) -> Gallery:
    """Choose the answers to look at.

    best: present targets, by IoU. worst: of equal answers, the most confident ones first. newly_*: by how much they
    changed; newly right: present targets first, as they have boxes to show.
    """
    scored = [(score, each) for each in now if (score := score_of(each)) is not None]
    before = {_question(each): score for each in former if (score := score_of(each)) is not None}
    changes = [(score - before[_question(each)], score, each) for score, each in scored if _question(each) in before]

    def first(ranked: list[tuple[float, Prediction]], shown: Sequence[Prediction] = ()) -> list[Prediction]:
        """Take the lowest numbers first, ties in the order of the data; no image that is shown already."""
        keys = {each.key for each in shown}
        by_photo: dict[str, Prediction] = {}
        for _, each in sorted(ranked, key=lambda pair: pair[0]):
            if each.key not in keys:
                by_photo.setdefault(each.key, each)
        return list(by_photo.values())[:num_photos]

    newly_right = first(
        [
            (-change + 2 * (not each.truth_boxes_xyxy), each)
            for change, score, each in changes
            if score >= HIT > score - change
        ]
    )
    newly_wrong = first([(change, each) for change, score, each in changes if score < HIT <= score - change])
    return Gallery(
        best=first([(-score, each) for score, each in scored if each.truth_boxes_xyxy and score >= HIT], newly_right),
        worst=first([(score - _confidence(each) / 1e3, each) for score, each in scored if score < HIT], newly_wrong),
        newly_right=newly_right,
        newly_wrong=newly_wrong,
    )


def _question(each: Prediction) -> tuple[str, int, str]:
    return each.key, each.turn, each.prompt


def _confidence(each: Prediction) -> float:
    return max(each.confidences or (0.0,))
