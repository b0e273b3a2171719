"""A run folder as a training run leaves it, with answers of growing quality: real files, real scores, no model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cogvlm_ft.config import load_config, save_config
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.look import turns_of
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.evaluate.evaluate import Evaluation, save_evaluation
from cogvlm_ft.evaluate.questions import truth_boxes
from cogvlm_ft.grounding.boxes import format_boxes
from cogvlm_ft.grounding.breakdown import summarize_predictions
from cogvlm_ft.grounding.metrics import score_answer
from cogvlm_ft.grounding.prediction import Prediction
from cogvlm_ft.grounding.protocols import OURS
from cogvlm_ft.grounding.targets import Box, Turn
from cogvlm_ft.grounding.wording import Wording, load_wording
from cogvlm_ft.tracking.sample_losses import SampleLosses
from cogvlm_ft.tracking.tracker import Tracker

NUM_PATCHES = 16
STEPS = {0: 2.0, 20: 0.3, 40: 0.05}
"""Step -> how far answered corners are off, as a fraction of the box."""
HARD = 7
"""This training sample has a high loss in every epoch."""


def write_run(folder: Path, shards: Path) -> None:
    """Write three evaluations, forty steps over four epochs, and the losses of every training sample."""
    reader, train = (ShardReader(load_index(shards, split)) for split in ("val", "train"))
    settings = [f"output_dir={folder}", f"data.shards={shards}", "model.path=models/tiny", "tracking.mode=disabled"]
    config = load_config(None, settings)
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    facts = {"command": "launch/train.py 'https://me:secret@host/x'", "world_size": 2, "config_sha256": "c0ffee"}
    tracker = Tracker(folder, mode="disabled", config=facts)
    losses = SampleLosses(folder, 0, 1, 0)
    for step in range(max(STEPS) + 1):
        if step > 0:
            tracker.log_train(step, {"loss": 3 / step**0.5, "lr": 1e-3 / step, "grad_norm": 1.0, "images_per_s": 8.0})
            _add_losses(losses, train, step)
        if step in STEPS:
            found = evaluation_of(reader, STEPS[step], about={"step": step, "data_sha256": reader.index.data_sha256})
            tracker.log_val(step / 10, step, found.metrics)
            save_evaluation(found, folder / "evaluations" / f"step-{step:08d}")
    tracker.finish()


def _add_losses(losses: SampleLosses, train: ShardReader, step: int) -> None:
    """Add a tenth of the samples in each of ten steps."""
    numbers = range((step - 1) % 10, len(train), 10)
    values = [30.0 if i == HARD else 5.0 + i / 100 for i in numbers]
    losses.add(step, (step - 1) // 10, [train.index.key(i) for i in numbers], values, [10] * len(values))


def evaluation_of(reader: ShardReader, noise: float, about: dict[str, object]) -> Evaluation:
    wording, random = load_wording("box"), np.random.default_rng(round(100 * noise))
    predictions: list[Prediction] = []
    for i in range(len(reader)):
        record = reader.read(i).record
        turns = turns_of(record, wording, seed=0, epoch=0)
        size = record.image_size_px
        assert size is not None
        predictions += [_predict(record.key, n, turn, size, wording, noise, random) for n, turn in enumerate(turns)]
    summary = summarize_predictions(predictions, NUM_PATCHES)
    metrics = {**summary.metrics, "num_images": float(len(reader))}
    known = {"protocol": "ours", "num_patches": NUM_PATCHES, "split": "val"}
    return Evaluation(metrics, predictions, [], summary.curves, {**known, **about})


def _predict(
    key: str,
    number: int,
    turn: Turn,
    size: tuple[int, int],
    wording: Wording,
    noise: float,
    random: np.random.Generator,
) -> Prediction:
    not_found = wording.not_found_sentences
    truth = truth_boxes(turn, size, not_found)
    sure = float(np.clip(1 - noise * random.random(), 0.05, 0.99))
    if truth is None or noise > 1:
        answer = "?"
    elif truth:
        answer = format_boxes(list(_moved(truth, size, noise, random)), size)
    else:
        answer = turn.answer if random.random() > noise else "[[100,100,400,400]]"
    boxes = OURS.read(answer, size)
    return Prediction(
        key=key,
        turn=number,
        prompt=turn.prompt,
        answer=answer,
        truth=turn.answer,
        boxes_xyxy=boxes,
        truth_boxes_xyxy=truth,
        image_size_px=size,
        score=score_answer(answer, truth, size, not_found, turn.answer),
        confidences=None if boxes is None else [sure] * len(boxes),
        not_found_prob=round((0.02 if truth else 0.8) * sure, 4),
        language=turn.target.language if turn.target else "en",
        source="scenes",
        style=turn.style,
        frame_px=size,
        phrase=turn.target.phrase if turn.target else "",
    )


def _moved(boxes: Iterable[Box], size: tuple[int, int], noise: float, random: np.random.Generator) -> Iterable[Box]:
    for x0, y0, x1, y1 in boxes:
        dx, dy = (noise * (x1 - x0) * random.normal(), noise * (y1 - y0) * random.normal())
        yield (max(x0 + dx, 0), max(y0 + dy, 0), min(x1 + dx, size[0]), min(y1 + dy, size[1]))
