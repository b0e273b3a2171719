"""Ask the model about held-out images, score the answers against the records, save both."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from cogvlm_ft.data.frames import Frame, move_record, whole_frame
from cogvlm_ft.data.look import turns_of
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.record import Record, detect_language
from cogvlm_ft.data.transforms import model_input, resize_of
from cogvlm_ft.errors import DataError
from cogvlm_ft.evaluate.draw import DrawnTurn, draw_boxes
from cogvlm_ft.evaluate.generate import Answer, generate_answers
from cogvlm_ft.grounding.boxes import boxes_from_bins, parse_boxes, read_boxes
from cogvlm_ft.grounding.breakdown import summarize_predictions
from cogvlm_ft.grounding.descriptions import text_without_boxes
from cogvlm_ft.grounding.grammar import BoxGrammar
from cogvlm_ft.grounding.metrics import score_answer
from cogvlm_ft.grounding.prediction import Prediction, is_right
from cogvlm_ft.grounding.protocols import PROTOCOLS, Protocol
from cogvlm_ft.grounding.targets import Box, Turn
from cogvlm_ft.grounding.wording import Wording
from cogvlm_ft.model.configuration import CogVLMConfig
from cogvlm_ft.model.tokenizer import CogVLMTokenizer
from cogvlm_ft.runtime.distributed import device, from_main, gather_to_main, is_main, rank, world_size
from cogvlm_ft.runtime.engine import inference
from cogvlm_ft.runtime.param_gathering import parameters_gathered
from cogvlm_ft.runtime.stop_signals import StopRequest
from cogvlm_ft.settings import EvaluateConfig

logger = logging.getLogger(__name__)

METRICS_FILE, PREDICTIONS_FILE, PICTURES_FOLDER = "metrics.json", "predictions.jsonl", "pictures"
CURVES_FILE = "curves.json"
ABOUT = "about"
"""The key of metrics.json whose value is not a number."""


@dataclass(frozen=True)
class Question:
    """One image and all its turns, whose boxes are in pixels of the frame. source: where the image came from."""

    index: int
    key: str
    source: str
    image: Image.Image
    frame: Frame
    turns: list[Turn]


@dataclass(frozen=True)
class Shown:
    """An image to draw, with its answered turns."""

    key: str
    image: Image.Image
    predictions: list[Prediction]


@dataclass(frozen=True)
class Evaluation:
    """metrics: on every rank. The rest: rank 0 only; predictions and shown in the order of the data.

    curves: grounding.breakdown.Summary. about: weights, data, questions and scoring.
    """

    metrics: dict[str, float]
    predictions: list[Prediction]
    shown: list[Shown]
    curves: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def evaluate(
    model: Any,
    tokenizer: CogVLMTokenizer,
    reader: ShardReader,
    wording: Wording,
    settings: EvaluateConfig,
    *,
    seed: int,
    about: Mapping[str, Any] | None = None,
    stop_request: StopRequest | None = None,
) -> Evaluation:
    """Score `model` (the module inside the engine) on the reader's first `max_samples` images. Collective.

    Every rank takes every world_size-th image and runs the same number of batches; no image is scored twice.
    about: facts of the caller about the weights, recorded with the results. stop_request: checked before every batch;
    raises StopRequested.
    """
    num_samples = min(len(reader), settings.max_samples or len(reader))
    mine = range(rank(), num_samples, world_size())
    num_batches = -(-num_samples // (world_size() * settings.batch_size))
    num_bad = 0
    answered: list[tuple[int, list[Prediction]]] = []
    grammar = build_grammar(tokenizer, wording, settings.decoding, settings.min_boxes, settings.max_new_tokens)
    with inference(model), parameters_gathered(model, settings.gather):
        for batch in tqdm(
            range(num_batches), desc="evaluate", unit="batch", disable=None if is_main() else True, leave=False
        ):
            if stop_request:
                stop_request.check()
            indices = mine[batch * settings.batch_size : (batch + 1) * settings.batch_size]
            questions = list(_read_questions(reader, indices, wording, seed, resize_of(model.config)))
            num_bad += len(indices) - len(questions)
            answered += _answer(model, tokenizer, questions, wording, settings, grammar)
    gathered = gather_to_main((answered, num_bad))
    if gathered is None:
        return Evaluation(from_main(None), [], [])
    by_index = sorted((pair for part, _ in gathered for pair in part), key=lambda pair: pair[0])
    predictions = [prediction for _, part in by_index for prediction in part]
    summary = summarize_predictions(predictions, model.config.num_patches, PROTOCOLS[settings.protocol])
    metrics = {**summary.metrics, "num_images": float(len(by_index)), "num_bad": float(sum(bad for _, bad in gathered))}
    metrics |= _count_left_out(predictions)
    facts = {**_about(model.config, reader, wording, settings, seed, predictions), **(about or {})}
    shown = [Shown(part[0].key, reader.read(index).image, part) for index, part in by_index[: settings.num_pictures]]
    return Evaluation(from_main(metrics), predictions, shown, summary.curves, facts)


def _about(
    config: CogVLMConfig,
    reader: ShardReader,
    wording: Wording,
    settings: EvaluateConfig,
    seed: int,
    predictions: Sequence[Prediction],
) -> dict[str, Any]:
    """Return the facts that must be equal for two results to be comparable, apart from the weights."""
    asked = "\n".join(f"{each.key}\t{each.turn}\t{each.prompt}" for each in predictions)
    return {
        "protocol": settings.protocol,
        "wording": wording.name,
        "not_found": list(wording.not_found_sentences),
        "template_version": config.template_version,
        "questions_sha256": hashlib.sha256(asked.encode("utf-8", "backslashreplace")).hexdigest(),
        "split": reader.index.split,
        "data_sha256": reader.index.data_sha256,
        "seed": seed,
        "max_samples": settings.max_samples,
        "image_size": config.image_size,
        "num_patches": config.num_patches,
        "resize": resize_of(config),
        "decoding": settings.decoding,
        "min_boxes": settings.min_boxes,
        "max_new_tokens": settings.max_new_tokens,
    }


def _count_left_out(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Count the answers that are not scored, and the true boxes that are not asked for."""
    return {
        "num_unscored": float(sum(prediction.score is None for prediction in predictions)),
        "num_cut_boxes": float(sum(prediction.num_cut_boxes for prediction in predictions)),
    }


def _read_questions(
    reader: ShardReader, indices: Iterable[int], wording: Wording, seed: int, resize: str
) -> Iterator[Question]:
    """Yield the usable images among `indices`. The wording is that of epoch 0, so every evaluation asks the same."""
    for index in indices:
        try:
            sample = reader.read(index)
            frame = whole_frame(sample.record, resize)
            worded = turns_of(move_record(sample.record, frame), wording, seed=seed, epoch=0)
            turns = [turn for turn in worded if turn.prompt.strip()]
        except DataError as error:
            logger.warning("validation image cannot be used: %s", error)  # and counted by the caller
            continue
        if turns:
            yield Question(index, sample.record.key, _source_of(reader, sample.record), sample.image, frame, turns)


def _source_of(reader: ShardReader, record: Record) -> str:
    """Return the shard set, the prefix of its keys, where there are several; else the annotation."""
    return record.key.partition("/")[0] if len(reader.index.source_sizes) > 1 else record.source


def build_grammar(
    tokenizer: CogVLMTokenizer, wording: Wording, decoding: str, min_boxes: int, max_new_tokens: int
) -> BoxGrammar | None:
    """Build the grammar of answers about boxes; None allows anything. ConfigError if no answer fits max_new_tokens."""
    if decoding == "free":
        return None
    grammar = BoxGrammar(tokenizer.piece_bytes, tokenizer.eos_token_id, wording.not_found_sentences, min_boxes)
    grammar.start(max_new_tokens)  # here, on every rank: perhaps only one rank asks such a question
    return grammar


@dataclass(frozen=True)
class _Asked:
    """An image and its turns as `generate_answers` takes them, one entry per turn. pixels: f[3, S, S]."""

    pixels: torch.Tensor
    prompts: list[str]
    histories: list[Sequence[tuple[str, str]]]
    grammars: list[BoxGrammar | None]


def _answer(
    model: Any,
    tokenizer: CogVLMTokenizer,
    questions: Sequence[Question],
    wording: Wording,
    settings: EvaluateConfig,
    grammar: BoxGrammar | None,
) -> list[tuple[int, list[Prediction]]]:
    """Answer and score a batch. Collective: a rank without questions asks about a blank image, so all calls match."""
    size, protocol = model.config.image_size, PROTOCOLS[settings.protocol]
    asked = [_ask(question, size, wording, grammar) for question in questions]
    asked = asked or [_Asked(torch.zeros(3, size, size), ["?"], [()], [None])]
    answers = generate_answers(
        model,
        tokenizer,
        torch.stack([each.pixels for each in asked]).to(device()),
        [each.prompts for each in asked],
        settings.max_new_tokens,
        [each.histories for each in asked],
        not_found=wording.not_found_sentences,
        grammars=[each.grammars for each in asked],
    )
    return [
        (question.index, [_predict(question, i, answer, wording, protocol) for i, answer in enumerate(row)])
        for question, row in zip(questions, answers, strict=False)  # the blank image has answers but no question
    ]


def _ask(question: Question, size: int, wording: Wording, grammar: BoxGrammar | None) -> _Asked:
    """Prepare the turns of a question; the grammar applies where a good answer holds boxes."""
    frame_px, not_found = question.frame.size_px, wording.not_found_sentences
    return _Asked(
        pixels=model_input(question.image, question.frame, size),
        prompts=[turn.prompt for turn in question.turns],
        histories=[turn.history for turn in question.turns],
        grammars=[grammar if asks_for_boxes(turn, frame_px, not_found) else None for turn in question.turns],
    )


def asks_for_boxes(turn: Turn, image_size_px: tuple[int, int], not_found: Sequence[str]) -> bool:
    """Decide whether a good answer holds boxes or is a not-found sentence."""
    return turn.scored and truth_boxes(turn, image_size_px, not_found) is not None


def _predict(question: Question, number: int, answer: Answer, wording: Wording, protocol: Protocol) -> Prediction:
    """Score an answer in the frame, where a pixel is as large as in the original image."""
    turn, frame, size = question.turns[number], question.frame, question.frame.size_px
    not_found = wording.not_found_sentences
    truth = truth_boxes(turn, size, not_found)
    read = read_boxes(answer.text, answer.digit_probs)
    boxes = protocol.read(answer.text.strip(), size)
    score = score_answer(answer.text, truth, size, not_found, turn.answer, turn.num_cut_boxes, protocol)
    return Prediction(
        key=question.key,
        turn=number,
        prompt=turn.prompt,
        answer=answer.text,
        truth=turn.answer,
        boxes_xyxy=None if boxes is None else list(frame.invert_boxes(boxes)),
        truth_boxes_xyxy=None if truth is None else list(frame.invert_boxes(truth)),
        image_size_px=frame.photo_px,
        score=score if turn.scored and protocol.takes(truth) else None,
        history=turn.history,
        num_cut_boxes=turn.num_cut_boxes,
        confidences=None if read is None else [round(box.confidence, 4) for box in read],
        expected_boxes_xyxy=None
        if read is None
        else list(frame.invert_boxes(_boxes([box.expected for box in read], size))),
        not_found_prob=None if answer.not_found_prob is None else round(answer.not_found_prob, 4),
        described=_is_described(turn, truth),
        language=turn.target.language if turn.target else detect_language(turn.prompt + turn.answer),
        source=question.source,
        style=turn.style,
        frame_px=size,
        phrase=turn.target.phrase if turn.target else "",
    )


def _is_described(turn: Turn, truth: Sequence[Box] | None) -> bool:
    """Decide whether the true answer describes the target, beyond the sentence around its boxes."""
    if not turn.scored or truth is None:
        return True
    if turn.target is None:
        return bool(truth and text_without_boxes(turn.answer))
    return bool(turn.target.description and turn.target.description in turn.answer)


def truth_boxes(turn: Turn, image_size_px: tuple[int, int], not_found: Sequence[str]) -> list[Box] | None:
    """Return the target's boxes in pixels; of a verbatim turn those in its answer, [] for "not found", else None."""
    if turn.target is not None:
        return list(turn.target.boxes_xyxy)
    if turn.answer.strip() in not_found:
        return []
    bins = parse_boxes(turn.answer)
    return None if bins is None else _boxes(bins, image_size_px)


def _boxes(bins: Sequence[Box], image_size_px: tuple[int, int]) -> list[Box]:
    return [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes_from_bins(bins, image_size_px).tolist()]


def save_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Save metrics.json, curves.json, predictions.jsonl and the drawn images. Rank 0 only."""
    (folder / PICTURES_FOLDER).mkdir(parents=True, exist_ok=True)
    results = {**evaluation.metrics, ABOUT: evaluation.about}
    (folder / METRICS_FILE).write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / CURVES_FILE).write_text(json.dumps(evaluation.curves) + "\n", encoding="utf-8")
    with (folder / PREDICTIONS_FILE).open("w", encoding="utf-8") as file:
        for prediction in evaluation.predictions:
            file.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")
    for number, shown in enumerate(evaluation.shown):
        picture = draw_boxes(shown.image, [_drawn(prediction) for prediction in shown.predictions])
        picture.save(folder / PICTURES_FOLDER / f"{number:02d}-{_as_file_name(shown.key)}.png")


def _drawn(prediction: Prediction) -> DrawnTurn:
    return DrawnTurn(
        prompt=prediction.prompt,
        answer=prediction.answer,
        phrase=prediction.phrase,
        answer_boxes=prediction.boxes_xyxy,
        truth=prediction.truth,
        truth_boxes=prediction.truth_boxes_xyxy or (),
        is_right=is_right(prediction),
    )


def _as_file_name(key: str) -> str:
    """Convert a key to a file name: keys of foreign shards may hold slashes and any other characters, at any length."""
    return re.sub(r"[/\\\x00-\x1f]", "-", key).encode("utf-8", "replace")[:200].decode("utf-8", "ignore")
