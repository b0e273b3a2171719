"""Ask the model about held-out images, score the answers against the records, save both."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.record import detect_language
from cogvlm_ft.data.transforms import model_input, resize_of
from cogvlm_ft.errors import DataError, ServerError
from cogvlm_ft.evaluate.draw import DrawnTurn, draw_boxes
from cogvlm_ft.evaluate.generate import Answer, generate_answers
from cogvlm_ft.evaluate.questions import Question, asks_for_boxes, in_pixels, read_questions, truth_boxes
from cogvlm_ft.evaluate.survey import Survey, choose_limit, survey_questions
from cogvlm_ft.grounding.boxes import read_boxes
from cogvlm_ft.grounding.breakdown import summarize_predictions
from cogvlm_ft.grounding.descriptions import text_without_boxes
from cogvlm_ft.grounding.grammar import BoxGrammar
from cogvlm_ft.grounding.metrics import score_answer
from cogvlm_ft.grounding.prediction import Prediction, is_right
from cogvlm_ft.grounding.protocols import PROTOCOLS, Protocol
from cogvlm_ft.grounding.targets import Box, Turn
from cogvlm_ft.grounding.wording import Wording
from cogvlm_ft.model.configuration import CogVLMConfig
from cogvlm_ft.model.generation_memory import GenerationMemory, Pass
from cogvlm_ft.model.tokenizer import CogVLMTokenizer
from cogvlm_ft.runtime.distributed import device, from_main, gather_to_main, is_main, rank, world_size
from cogvlm_ft.runtime.engine import inference
from cogvlm_ft.runtime.param_gathering import free_bytes, parameters_gathered
from cogvlm_ft.runtime.stop_signals import StopRequest, stopping_together
from cogvlm_ft.settings import EvaluateConfig
from cogvlm_ft.terminal import progress_bar

logger = logging.getLogger(__name__)

METRICS_FILE, PREDICTIONS_FILE, PICTURES_FOLDER = "metrics.json", "predictions.jsonl", "pictures"
CURVES_FILE = "curves.json"
ABOUT = "about"
"""The key of metrics.json whose value is not a number."""


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
    about: facts of the caller about the weights, recorded with the results. stop_request: checked at every batch, and
    asked to stop where shards cannot be read; raises StopRequested.
    """
    num_samples = min(len(reader), settings.max_samples or len(reader))
    mine = range(rank(), num_samples, world_size())
    num_bad = 0
    answered: list[tuple[int, list[Prediction]]] = []
    grammar = build_grammar(tokenizer, wording, settings.decoding, settings.min_boxes)
    survey = survey_questions(reader, num_samples, wording, tokenizer, model.config, seed, stop_request)
    limit = choose_limit(survey, model.config, settings.max_new_tokens, grammar.least_tokens if grammar else 1)
    if grammar:
        grammar.start(limit)  # here, on every rank: perhaps only one rank asks such a question
    asking = _Asking(wording, PROTOCOLS[settings.protocol], grammar, limit)
    with inference(model), parameters_gathered(model, settings.gather):
        size = choose_pass(model, survey, limit, settings.batch_size)
        batches = [mine[start : start + size.num_images] for start in range(0, len(mine), size.num_images)]
        num_batches = -(-num_samples // (world_size() * size.num_images))
        for batch in progress_bar(range(num_batches), desc="evaluate", unit="batch", is_shown=is_main()):
            indices = batches[batch] if batch < len(batches) else mine[:0]
            with stopping_together(stop_request, DataError, ServerError):
                questions = list(read_questions(reader, indices, wording, seed, resize_of(model.config)))
            num_bad += len(indices) - len(questions)
            num_passes = survey.num_passes(batch, size, world_size())
            answered += _answer(model, tokenizer, questions, asking, size.num_turns, num_passes)
    gathered = gather_to_main((answered, num_bad))
    if gathered is None:
        return Evaluation(from_main(None), [], [])
    by_index = sorted((pair for part, _ in gathered for pair in part), key=lambda pair: pair[0])
    predictions = [prediction for _, part in by_index for prediction in part]
    summary = summarize_predictions(predictions, model.config.num_patches, PROTOCOLS[settings.protocol])
    metrics = {**summary.metrics, "num_images": float(len(by_index)), "num_bad": float(sum(bad for _, bad in gathered))}
    metrics |= _count_left_out(predictions)
    facts = {**_about(model.config, reader, wording, settings, seed, predictions), "max_new_tokens": limit}
    facts |= about or {}
    shown = list(_shown(reader, by_index[: settings.num_pictures]))
    return Evaluation(from_main(metrics), predictions, shown, summary.curves, facts)


def _shown(reader: ShardReader, answered: Sequence[tuple[int, list[Prediction]]]) -> Iterator[Shown]:
    """Yield images to draw; one that cannot be read again is left out, because the results are there."""
    for index, part in answered:
        try:
            yield Shown(part[0].key, reader.read(index).image, part)
        except (OSError, DataError, ServerError) as error:
            logger.warning("an image of the evaluation cannot be drawn: %s", error)


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
    }


def _count_left_out(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Count the answers that are not scored, and the true boxes that are not asked for."""
    return {
        "num_unscored": float(sum(prediction.score is None for prediction in predictions)),
        "num_cut_boxes": float(sum(prediction.num_cut_boxes for prediction in predictions)),
    }


def build_grammar(tokenizer: CogVLMTokenizer, wording: Wording, decoding: str, min_boxes: int) -> BoxGrammar | None:
    """Build the grammar of answers about boxes; None allows anything."""
    if decoding == "free":
        return None
    return BoxGrammar(tokenizer.piece_bytes, tokenizer.eos_token_id, wording.not_found_sentences, min_boxes)


def choose_pass(model: Any, survey: Survey, limit: int, batch_size: int) -> Pass:
    """Choose how many images and turns are asked together, by the memory that is free now; all ranks the same.

    Collective.
    """
    memory = GenerationMemory(model.config, model.lm_head.weight.element_size(), survey.prompt_tokens, limit)
    free = gather_to_main(free_bytes())
    num_free: int = from_main(min(free) if free else None)
    return memory.choose_pass(survey.num_turns, batch_size, num_free, world_size())


@dataclass(frozen=True)
class _Asking:
    """How all questions are asked and their answers are read. limit: of new tokens."""

    wording: Wording
    protocol: Protocol
    grammar: BoxGrammar | None
    limit: int


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
    asking: _Asking,
    turns_per_pass: int,
    num_passes: int,
) -> list[tuple[int, list[Prediction]]]:
    """Answer and score a batch. Collective: a rank without questions asks about a blank image, so all calls match."""
    size, wording = model.config.image_size, asking.wording
    asked = [_ask(question, size, wording, asking.grammar) for question in questions]
    asked = asked or [_Asked(torch.zeros(3, size, size), ["?"], [()], [None])]
    answers = generate_answers(
        model,
        tokenizer,
        torch.stack([each.pixels for each in asked]).to(device()),
        [each.prompts for each in asked],
        asking.limit,
        [each.histories for each in asked],
        not_found=wording.not_found_sentences,
        grammars=[each.grammars for each in asked],
        turns_per_pass=turns_per_pass,
        num_passes=num_passes,
    )
    return [
        (question.index, [score_turn(question, i, answer, wording, asking.protocol) for i, answer in enumerate(row)])
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


def score_turn(question: Question, number: int, answer: Answer, wording: Wording, protocol: Protocol) -> Prediction:
    """Score an answer in the frame, where a pixel is as large as in the original image."""
    turn, frame, size = question.turns[number], question.frame, question.frame.size_px
    not_found = wording.not_found_sentences
    truth = truth_boxes(turn, size, not_found)
    closed = answer.readable()
    read = read_boxes(closed.text, closed.digit_probs)
    boxes = protocol.read(closed.text.strip(), size)
    score = score_answer(closed.text, truth, size, not_found, turn.answer, turn.num_cut_boxes, protocol)
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
        else list(frame.invert_boxes(in_pixels([box.expected for box in read], size))),
        not_found_prob=None if answer.not_found_prob is None else round(answer.not_found_prob, 4),
        described=_is_described(turn, truth),
        language=turn.target.language if turn.target else detect_language(turn.prompt + turn.answer),
        source=question.source,
        style=turn.style,
        frame_px=size,
        phrase=turn.target.phrase if turn.target else "",
        truncated=answer.truncated,
    )


def _is_described(turn: Turn, truth: Sequence[Box] | None) -> bool:
    """Decide whether the true answer describes the target, beyond the sentence around its boxes."""
    if not turn.scored or truth is None:
        return True
    if turn.target is None:
        return bool(truth and text_without_boxes(turn.answer))
    return bool(turn.target.description and turn.target.description in turn.answer)


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
