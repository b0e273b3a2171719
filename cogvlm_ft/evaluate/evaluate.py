"""Ask the model about held-out photos, score the answers against the records, write both down."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from cogvlm_ft.config import EvaluateConfig
from cogvlm_ft.data.loader import turns_of
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.transforms import Frame, move_record, resize_of, whole_frame
from cogvlm_ft.errors import DataError
from cogvlm_ft.evaluate.draw import draw_boxes
from cogvlm_ft.evaluate.generate import generate_answers
from cogvlm_ft.grounding.boxes import boxes_from_bins, parse_boxes
from cogvlm_ft.grounding.metrics import AnswerScore, score_answer, summarize
from cogvlm_ft.grounding.targets import Box, Turn
from cogvlm_ft.grounding.wording import Wording
from cogvlm_ft.model.preprocess import preprocess_image
from cogvlm_ft.model.tokenizer import CogVLMTokenizer
from cogvlm_ft.runtime.distributed import device, from_main, gather_to_main, is_main, rank, world_size
from cogvlm_ft.runtime.engine import inference

logger = logging.getLogger(__name__)

METRICS_FILE, PREDICTIONS_FILE, PICTURES_FOLDER = "metrics.json", "predictions.jsonl", "pictures"


@dataclass(frozen=True)
class Prediction:
    """One answered turn. Boxes in pixels of the stored photo; boxes_xyxy None = unreadable or not found;
    truth_boxes_xyxy empty = absent, None = a turn without boxes; score None = free text, which is not scored.

    history: the true (prompt, answer) pairs before it. num_cut_boxes: true boxes that need not be named.
    """

    key: str
    turn: int
    prompt: str
    answer: str
    truth: str
    boxes_xyxy: list[Box] | None
    truth_boxes_xyxy: list[Box] | None
    image_size_px: tuple[int, int]
    score: AnswerScore | None
    history: tuple[tuple[str, str], ...] = ()
    num_cut_boxes: int = 0


@dataclass(frozen=True)
class Question:
    """One photo and all its turns, whose boxes are in pixels of the frame."""

    index: int
    key: str
    image: Image.Image
    frame: Frame
    turns: list[Turn]


@dataclass(frozen=True)
class Shown:
    """A photo to look at, with its answered turns."""

    key: str
    image: Image.Image
    predictions: list[Prediction]


@dataclass(frozen=True)
class Evaluation:
    """metrics: on every rank. predictions and shown: rank 0 only, in the order of the data."""

    metrics: dict[str, float]
    predictions: list[Prediction]
    shown: list[Shown]


def evaluate(
    model: Any,
    tokenizer: CogVLMTokenizer,
    reader: ShardReader,
    wording: Wording,
    settings: EvaluateConfig,
    *,
    seed: int,
) -> Evaluation:
    """Collective. Score `model` (the module inside the engine) on the reader's first `max_samples` photos.

    Every rank takes every world_size-th photo and runs the same number of batches; no photo is scored twice.
    """
    num_samples = min(len(reader), settings.max_samples or len(reader))
    mine = range(rank(), num_samples, world_size())
    num_batches = -(-num_samples // (world_size() * settings.batch_size))
    num_bad = 0
    answered: list[tuple[int, list[Prediction]]] = []
    with inference(model):
        for batch in tqdm(
            range(num_batches), desc="evaluate", unit="batch", disable=None if is_main() else True, leave=False
        ):
            indices = mine[batch * settings.batch_size : (batch + 1) * settings.batch_size]
            questions = list(_read_questions(reader, indices, wording, seed, resize_of(model.config)))
            num_bad += len(indices) - len(questions)
            answered += _answer(model, tokenizer, questions, wording, settings.max_new_tokens)
    gathered = gather_to_main((answered, num_bad))
    if gathered is None:
        return Evaluation(from_main(None), [], [])
    by_index = sorted((pair for part, _ in gathered for pair in part), key=lambda pair: pair[0])
    predictions = [prediction for _, part in by_index for prediction in part]
    metrics = summarize([prediction.score for prediction in predictions if prediction.score])
    metrics |= {"num_images": float(len(by_index)), "num_bad": float(sum(bad for _, bad in gathered))}
    metrics |= _count_left_out(predictions)
    shown = [Shown(part[0].key, reader.read(index).image, part) for index, part in by_index[: settings.num_pictures]]
    return Evaluation(from_main(metrics), predictions, shown)


def _count_left_out(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Answers that are not scored, and true boxes that are not asked for."""
    return {
        "num_unscored": float(sum(prediction.score is None for prediction in predictions)),
        "num_cut_boxes": float(sum(prediction.num_cut_boxes for prediction in predictions)),
    }


def _read_questions(
    reader: ShardReader, indices: Iterable[int], wording: Wording, seed: int, resize: str
) -> Iterator[Question]:
    """The usable photos among `indices`. The wording is that of epoch 0, so every evaluation asks the same."""
    for index in indices:
        try:
            sample = reader.read(index)
            frame = whole_frame(sample.record, resize)
            worded = turns_of(move_record(sample.record, frame), wording, seed=seed, epoch=0)
            turns = [turn for turn in worded if turn.prompt.strip()]
        except DataError as error:
            logger.warning("validation photo cannot be used: %s", error)  # and counted by the caller
            continue
        if turns:
            yield Question(index, sample.record.key, sample.image, frame, turns)


def _answer(
    model: Any, tokenizer: CogVLMTokenizer, questions: Sequence[Question], wording: Wording, max_new_tokens: int
) -> list[tuple[int, list[Prediction]]]:
    """Collective. A rank without questions asks one about a blank picture, so that all ranks make the same calls."""
    size = model.config.image_size
    seen = [question.frame.apply_image(question.image, size) for question in questions]
    pixels = [preprocess_image(image, size) for image in seen] or [torch.zeros(3, size, size)]
    prompts = [[turn.prompt for turn in question.turns] for question in questions] or [["?"]]
    histories = [[turn.history for turn in question.turns] for question in questions] or [[()]]
    answers = generate_answers(model, tokenizer, torch.stack(pixels).to(device()), prompts, max_new_tokens, histories)
    return [
        (question.index, [_predict(question, i, answer, wording) for i, answer in enumerate(texts)])
        for question, texts in zip(questions, answers, strict=False)
    ]


def _predict(question: Question, number: int, answer: str, wording: Wording) -> Prediction:
    """Scored in the frame, where a pixel is as large as in the photo."""
    turn, frame, size = question.turns[number], question.frame, question.frame.size_px
    not_found = wording.not_found_sentences
    truth = truth_boxes(turn, size, not_found)
    bins = parse_boxes(answer)
    score = score_answer(answer, truth, size, not_found, truth_text=turn.answer, num_cut_boxes=turn.num_cut_boxes)
    return Prediction(
        key=question.key,
        turn=number,
        prompt=turn.prompt,
        answer=answer,
        truth=turn.answer,
        boxes_xyxy=None if bins is None else list(frame.invert_boxes(_boxes(bins, size))),
        truth_boxes_xyxy=None if truth is None else list(frame.invert_boxes(truth)),
        image_size_px=frame.photo_px,
        score=score if turn.scored else None,
        history=turn.history,
        num_cut_boxes=turn.num_cut_boxes,
    )


def truth_boxes(turn: Turn, image_size_px: tuple[int, int], not_found: Sequence[str]) -> list[Box] | None:
    """Pixels: the target's own boxes; for a verbatim turn those its answer names, [] for "not found", else None."""
    if turn.target is not None:
        return list(turn.target.boxes_xyxy)
    if turn.answer.strip() in not_found:
        return []
    bins = parse_boxes(turn.answer)
    return None if bins is None else _boxes(bins, image_size_px)


def _boxes(bins: Sequence[tuple[int, int, int, int]], image_size_px: tuple[int, int]) -> list[Box]:
    return [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes_from_bins(bins, image_size_px).tolist()]


def save_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Rank 0. metrics.json, predictions.jsonl and the drawn pictures."""
    (folder / PICTURES_FOLDER).mkdir(parents=True, exist_ok=True)
    (folder / METRICS_FILE).write_text(json.dumps(evaluation.metrics, indent=2) + "\n", encoding="utf-8")
    with (folder / PREDICTIONS_FILE).open("w", encoding="utf-8") as file:
        for prediction in evaluation.predictions:
            file.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")
    for number, shown in enumerate(evaluation.shown):
        truth = [prediction.truth_boxes_xyxy or () for prediction in shown.predictions]
        answered = [prediction.boxes_xyxy for prediction in shown.predictions]
        texts = [(prediction.prompt, prediction.answer) for prediction in shown.predictions]
        name = f"{number:02d}-{shown.key.replace('/', '-')}.png"  # a key of others' shards may have folders in it
        draw_boxes(shown.image, truth, answered, texts).save(folder / PICTURES_FOLDER / name)
