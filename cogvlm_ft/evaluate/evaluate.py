"""Ask the model about held-out images, score the answers against the records, save both."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.stored_photo import whole_image
from cogvlm_ft.data.transforms import model_input, resize_of
from cogvlm_ft.errors import DataError, ServerError
from cogvlm_ft.evaluate.draw import DrawnTurn, draw_boxes, scale_box
from cogvlm_ft.evaluate.generate import Answer, generate_answers
from cogvlm_ft.evaluate.looks import Look, LookReader
from cogvlm_ft.evaluate.questions import asks_for_boxes
from cogvlm_ft.evaluate.scoring import Reading, rank_merged, score_looks, summarize_merging
from cogvlm_ft.evaluate.survey import Survey, choose_limit, survey_questions
from cogvlm_ft.grounding.breakdown import summarize_predictions
from cogvlm_ft.grounding.confidence import ConfidenceCurve, KeptBoxes, choose_boxes
from cogvlm_ft.grounding.grammar import BoxGrammar
from cogvlm_ft.grounding.prediction import Prediction, is_right
from cogvlm_ft.grounding.protocols import PROTOCOLS
from cogvlm_ft.grounding.tile_answers import EVERY_BOX
from cogvlm_ft.grounding.wording import Wording
from cogvlm_ft.model.configuration import CogVLMConfig
from cogvlm_ft.model.generation_memory import GenerationMemory, Pass
from cogvlm_ft.model.tokenizer import CogVLMTokenizer
from cogvlm_ft.plain_files import replaced_file, write_text
from cogvlm_ft.runtime.distributed import device, from_main, gather_to_main, is_main, rank, world_size
from cogvlm_ft.runtime.engine import inference
from cogvlm_ft.runtime.param_gathering import free_bytes, parameters_gathered
from cogvlm_ft.runtime.stop_signals import StopRequest, stopping_together
from cogvlm_ft.settings import EvaluateConfig
from cogvlm_ft.terminal import progress_bar
from cogvlm_ft.tile_settings import TilesConfig

logger = logging.getLogger(__name__)

METRICS_FILE, PREDICTIONS_FILE, PICTURES_FOLDER = "metrics.json", "predictions.jsonl", "pictures"
CURVES_FILE = "curves.json"
ABOUT = "about"
"""The key of metrics.json whose value is not a number."""


@dataclass(frozen=True)
class Shown:
    """An image to draw, with its answered turns, whose boxes are in pixels of the photo. scale: of the image to it."""

    key: str
    image: Image.Image
    predictions: list[Prediction]
    scale: float = 1.0


@dataclass(frozen=True)
class Evaluation:
    """metrics, kept: on every rank. The rest: rank 0 only; predictions and shown in the order of the data.

    curves: grounding.breakdown.Summary. about: weights, data, questions and scoring. kept: which boxes from tiles
    counted; None without tiles.
    """

    metrics: dict[str, float]
    predictions: list[Prediction]
    shown: list[Shown]
    curves: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    kept: KeptBoxes | None = None


_Answered = tuple[Look, list[Answer]]
"""A look with the answers to its turns."""


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
    tiles: TilesConfig | None = None,
    kept: KeptBoxes | None = None,
) -> Evaluation:
    """Score `model` (the module inside the engine) on the reader's first `max_samples` images. Collective.

    Every rank takes every world_size-th image and runs the same number of batches; no image is scored twice.
    tiles: asks about the tiles of large photos too (`side_px` is not None). kept: which boxes from them count; None:
    chosen on these images. `settings.min_confidence` replaces it.
    about: facts of the caller about the weights, recorded with the results. stop_request: checked at every batch, and
    asked to stop where shards cannot be read; raises StopRequested.
    """
    num_samples = min(len(reader), settings.max_samples or len(reader))
    tiles = tiles if tiles is not None and tiles.side_px is not None else None
    answered: dict[int, list[_Answered]] = {}
    grammar = build_grammar(tokenizer, wording, settings.decoding, settings.min_boxes)
    survey = survey_questions(reader, num_samples, wording, tokenizer, model.config, seed, stop_request, tiles)
    limit = choose_limit(survey, model.config, settings.max_new_tokens, grammar.least_tokens if grammar else 1)
    if grammar:
        grammar.start(limit)  # here, on every rank: perhaps only one rank asks such a question
    mine, looks = survey.places(rank(), world_size()), LookReader(reader, wording, seed, resize_of(model.config), tiles)
    with inference(model), parameters_gathered(model, settings.gather):
        size = choose_pass(model, survey, limit, settings.batch_size)
        passes = survey.passes(size, world_size())
        for batch in progress_bar(range(len(passes)), desc="evaluate", unit="batch", is_shown=is_main()):
            places = mine[batch * size.num_images : (batch + 1) * size.num_images]
            with stopping_together(stop_request, DataError, ServerError):
                shown = list(looks.read(places))
            rows = _answer(model, tokenizer, shown, wording, grammar, limit, size.num_turns, passes[batch])
            for look, row in zip(shown, rows, strict=False):  # a blank image has answers too
                answered.setdefault(look.question.index, []).append((look.without_image(), row))
    answered = {photo: given for photo, given in answered.items() if photo not in looks.bad}
    reading = Reading(wording, PROTOCOLS[settings.protocol], model.config.num_patches)
    rule = kept if settings.min_confidence is None else KeptBoxes(settings.min_confidence)
    curve = _confidence_curve(answered.values(), reading) if tiles and rule is None else None
    reading = replace(reading, kept=curve.kept if curve else rule or EVERY_BOX)
    used = reading.kept if tiles else None
    scored = {photo: score_looks(*_columns(given), reading) for photo, given in answered.items()}
    gathered = gather_to_main((scored, len(looks.bad)))
    if gathered is None:
        return Evaluation(from_main(None), [], [], kept=used)
    found = sorted((pair for part, _ in gathered for pair in part.items()), key=lambda pair: pair[0])
    predictions = [prediction for _, (part, _) in found for prediction in part]
    summary = summarize_predictions(predictions, model.config.num_patches, reading.protocol)
    metrics = {**summary.metrics, "num_images": float(len(found)), "num_bad": float(sum(bad for _, bad in gathered))}
    metrics |= _count_left_out(predictions) | summarize_merging([each for _, (_, each) in found if each], reading)
    curves = summary.curves | ({"confidence": curve.points} if curve else {})
    facts = {**_about(model.config, reader, wording, settings, seed, predictions), "max_new_tokens": limit}
    facts |= {"tiles": asdict(tiles), "kept_boxes_are_chosen_here": curve is not None} if tiles else {}
    drawn = list(_shown(reader, [(photo, part) for photo, (part, _) in found[: settings.num_pictures]]))
    return Evaluation(from_main(metrics), predictions, drawn, curves, facts | dict(about or {}), used)


def _confidence_curve(answered: Iterable[Sequence[_Answered]], reading: Reading) -> ConfidenceCurve | None:
    """Choose which boxes from tiles count, over all ranks. Collective."""
    gathered = gather_to_main([each for given in answered for each in rank_merged(*_columns(given), reading)])
    return from_main(choose_boxes([each for part in gathered for each in part]) if gathered is not None else None)


def _shown(reader: ShardReader, answered: Sequence[tuple[int, list[Prediction]]]) -> Iterator[Shown]:
    """Yield images to draw; one that cannot be read again is left out, because the results are there."""
    for index, part in answered:
        try:
            photo = reader.read(index).image
            image = whole_image(photo)
            yield Shown(part[0].key, image, part, image.width / photo.size[0])
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
    return memory.choose_pass([n for row in survey.num_turns for n in row], batch_size, num_free, world_size())


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
    looks: Sequence[Look],
    wording: Wording,
    grammar: BoxGrammar | None,
    limit: int,
    turns_per_pass: int,
    num_passes: int,
) -> list[list[Answer]]:
    """Answer a batch. Collective: a rank without looks asks about a blank image, so all calls match."""
    size = model.config.image_size
    asked = [_ask(look, size, wording, grammar) for look in looks]
    asked = asked or [_Asked(torch.zeros(3, size, size), ["?"], [()], [None])]
    return generate_answers(
        model,
        tokenizer,
        torch.stack([each.pixels for each in asked]).to(device()),
        [each.prompts for each in asked],
        limit,
        [each.histories for each in asked],
        not_found=wording.not_found_sentences,
        grammars=[each.grammars for each in asked],
        turns_per_pass=turns_per_pass,
        num_passes=num_passes,
    )


def _columns(given: Sequence[_Answered]) -> tuple[list[Look], list[list[Answer]]]:
    return [look for look, _ in given], [row for _, row in given]


def _ask(look: Look, size: int, wording: Wording, grammar: BoxGrammar | None) -> _Asked:
    """Prepare the turns about a look; the grammar applies where a good answer holds boxes."""
    frame_px, not_found = look.question.frame.size_px, wording.not_found_sentences
    return _Asked(
        pixels=model_input(look.question.image, look.frame, size),
        prompts=[turn.prompt for turn in look.turns],
        histories=[turn.history for turn in look.turns],
        grammars=[grammar if asks_for_boxes(turn, frame_px, not_found) else None for turn in look.turns],
    )


def save_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Save metrics.json, curves.json, predictions.jsonl and the drawn images. Rank 0 only.

    Each file is written whole or not at all, and predictions.jsonl, by which evaluations are found, after the numbers.
    """
    (folder / PICTURES_FOLDER).mkdir(parents=True, exist_ok=True)
    results = {**evaluation.metrics, ABOUT: evaluation.about}
    write_text(folder / METRICS_FILE, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / CURVES_FILE, json.dumps(evaluation.curves) + "\n")
    with replaced_file(folder / PREDICTIONS_FILE, "w") as file:
        for prediction in evaluation.predictions:
            file.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")
    for number, shown in enumerate(evaluation.shown):
        picture = draw_boxes(shown.image, [drawn_turn(prediction, shown.scale) for prediction in shown.predictions])
        picture.save(folder / PICTURES_FOLDER / f"{number:02d}-{_as_file_name(shown.key)}.png")


def drawn_turn(prediction: Prediction, scale: float) -> DrawnTurn:
    """Return how a prediction is drawn. scale: from pixels of the stored image to those of the drawn one."""
    return DrawnTurn(
        prompt=prediction.prompt,
        answer=prediction.answer,
        phrase=prediction.phrase,
        answer_boxes=[scale_box(box, scale) for box in prediction.boxes_xyxy or ()],
        readable=prediction.score is None or prediction.score.readable,
        truth=prediction.truth,
        truth_boxes=[scale_box(box, scale) for box in prediction.truth_boxes_xyxy or ()],
        is_right=is_right(prediction),
    )


def _as_file_name(key: str) -> str:
    """Convert a key to a file name: keys of foreign shards may hold slashes and any other characters, at any length."""
    return re.sub(r"[/\\\x00-\x1f]", "-", key).encode("utf-8", "replace")[:200].decode("utf-8", "ignore")
