"""Evaluation with tiles: each question about each tile, answers merged, scored on the photo."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_evaluate import NUM_PHOTOS, SEED, SETTINGS, reader_of

from cogvlm_ft.data.tiling import photo_tiles
from cogvlm_ft.evaluate import evaluate as evaluation
from cogvlm_ft.evaluate.coco import RESULTS_FILE, save_coco
from cogvlm_ft.evaluate.evaluate import Evaluation, evaluate
from cogvlm_ft.evaluate.generate import Answer
from cogvlm_ft.evaluate.results import Results
from cogvlm_ft.evaluate.survey import Survey
from cogvlm_ft.grounding.boxes import format_boxes
from cogvlm_ft.grounding.prediction import ranked_boxes
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.grounding.tiles import clip_to_window
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer
from cogvlm_ft.model.generation_memory import Pass
from cogvlm_ft.report.scores import ceilings_of
from cogvlm_ft.runtime.distributed import device
from cogvlm_ft.settings import EvaluateConfig
from cogvlm_ft.tile_settings import TilesConfig

TILES = TilesConfig(side_px=48, overlap=0.2, min_visible=0.6)
NOT_FOUND = load_wording("box").languages


def perfect_answers(reader: Any, tiles: TilesConfig, asked: list[int], *, doubtful_boxes: bool = False) -> Any:
    """Replace generation by a model that sees perfectly: what is at least half visible is answered with its box.

    doubtful_boxes: where a tile does not show the target, half of the answers are a wrong box that is hardly more
    probable than "not found".
    """
    photos = [reader.read(i) for i in range(NUM_PHOTOS)]
    truth = {(str(i), t.phrase): t for i, each in enumerate(photos) for t in each.record.targets}
    windows = photo_tiles((56, 56), tiles)
    shown = [(i, w) for i in range(NUM_PHOTOS) for w in [(0, 0, 56, 56), *windows]]
    place = iter(shown)

    def generate(model: Any, tokenizer: Any, pixels: Any, prompts: Sequence[Sequence[str]], *a: Any, **b: Any) -> Any:
        rows = []
        for row in prompts:
            photo, window = next(place)
            asked.append(len(row))
            rows.append([answer(photo, window, prompt) for prompt in row])
        return rows

    def answer(photo: int, window: Any, prompt: str) -> Answer:
        found = [t for (i, phrase), t in truth.items() if i == str(photo) and f"{phrase}" in prompt]
        if not found:
            return Answer("?", (), (), (), None)
        target = max(found, key=lambda t: len(t.phrase))
        boxes: list[Box] = []
        for box in target.boxes_xyxy:
            x0, y0, x1, y1 = clip_to_window(box, window)
            if min(x1 - x0, y1 - y0) > 0 and (x1 - x0) * (y1 - y0) * 2 >= (box[2] - box[0]) * (box[3] - box[1]):
                boxes.append((x0 - window[0], y0 - window[1], x1 - window[0], y1 - window[1]))
        size = window[2] - window[0], window[3] - window[1]
        if not boxes and doubtful_boxes and window != (0, 0, 56, 56) and (photo + window[0]) % 2:
            return Answer(format_boxes([(1, 1, 4, 4)], size), (), (), (), 0.45)
        text = format_boxes(boxes, size) if boxes else NOT_FOUND[target.language].not_found
        return Answer(text, (), (), (), 0.1 if boxes else 0.9)

    return generate


def test_perfect_answers_about_tiles_are_right_on_the_photo(
    tiny_model: CogVLMForCausalLM,
    tokenizer: CogVLMTokenizer,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiles = TilesConfig(side_px=48, overlap=0.2, whole=True)
    reader, asked = reader_of(shards), list[int]()
    monkeypatch.setattr(evaluation, "generate_answers", perfect_answers(reader, tiles, asked))
    found = evaluate(tiny_model.to(device()), tokenizer, reader, load_wording("box"), SETTINGS, seed=SEED, tiles=tiles)
    assert found.metrics["num_images"] == NUM_PHOTOS and len(asked) == 5 * NUM_PHOTOS
    assert found.metrics["acc@0.5"] == 1 and found.metrics["mean_iou"] > 0.9
    assert found.metrics["not_found_acc"] == 1 and found.metrics["unreadable"] == 0
    assert found.metrics["tile_duplicates"] > 1 and found.metrics["tile_merge_gain"] > 0.3
    assert found.about["tiles"]["side_px"] == 48
    plain = [each for each in found.predictions if each.truth_boxes_xyxy]
    assert all(each.boxes_xyxy and each.confidences for each in plain)
    assert ceilings_of(Results(Path(), found.metrics, found.about, {}, found.predictions)) == {}, "of whole images only"


def test_doubtful_boxes_of_tiles_are_removed_below_a_confidence_that_is_chosen_where_f1_is_highest(
    tiny_model: CogVLMForCausalLM,
    tokenizer: CogVLMTokenizer,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    tiles = TilesConfig(side_px=30, overlap=0.2, whole=True)
    reader, model, wording = reader_of(shards), tiny_model.to(device()), load_wording("box")

    def scored(settings: EvaluateConfig) -> Evaluation:
        answers = perfect_answers(reader, tiles, [], doubtful_boxes=True)
        monkeypatch.setattr(evaluation, "generate_answers", answers)
        return evaluate(model, tokenizer, reader, wording, settings, seed=SEED, tiles=tiles)

    every, chosen = scored(replace(SETTINGS, min_confidence=0.0)), scored(SETTINGS)
    assert every.metrics["tile_removed"] == 0 and not every.about["kept_boxes_are_chosen_here"]
    assert every.metrics["acc@0.5"] < 0.5 and every.metrics["not_found_acc"] < 0.5
    assert 0.55 < chosen.metrics["tile_min_confidence"] < 0.9 and chosen.about["kept_boxes_are_chosen_here"]
    assert chosen.metrics["acc@0.5"] == chosen.metrics["not_found_acc"] == 1 and chosen.metrics["tile_removed"] > 1
    assert chosen.curves["confidence"][0][1] == 1 and "confidence" not in every.curves
    ranking = [name for name in chosen.metrics if name.startswith(("ap", "ar"))]
    assert len(ranking) > 6 and chosen.metrics["ap"] < 0.99
    assert all(chosen.metrics[name] == every.metrics[name] for name in ranking), "the threshold decides no ranking"
    removed = [each for each in chosen.predictions if each.truth_boxes_xyxy == [] and each.removed_boxes_xyxy]
    assert {each.language for each in removed} == {"en", "zh"}
    assert all(each.answer == wording.languages[each.language].not_found for each in removed)
    save_coco(chosen.predictions, tmp_path)
    results = json.loads((tmp_path / RESULTS_FILE).read_text())
    assert len(results) == sum(len(ranked_boxes(each)[0]) for each in chosen.predictions if each.score)
    assert scored(replace(SETTINGS, min_confidence=0.7)).predictions == chosen.predictions


def test_all_ranks_run_equally_many_passes() -> None:
    """Rank 0 has images 0 and 2, rank 1 image 1 alone; each batch has as many passes as its longest look needs."""
    survey = Survey(((4, 1, 1), (2,), (3,)), (9, 9, 9), 5)
    assert survey.places(0, 2) == [(0, 0), (0, 1), (0, 2), (2, 0)] and survey.places(1, 2) == [(1, 0)]
    assert survey.passes(Pass(2, 2), 2) == [2, 2]
    assert survey.passes(Pass(1, 4), 2) == [1, 1, 1, 1]
    assert survey.passes(Pass(8, 1), 1) == [4]


def test_a_real_model_is_asked_about_every_tile_and_turns_without_boxes_about_the_photo(
    tiny_model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, shards: Path
) -> None:
    model, reader, wording = tiny_model.to(device()), reader_of(shards), load_wording("box")
    whole = evaluate(model, tokenizer, reader, wording, SETTINGS, seed=SEED)
    tiled = evaluate(model, tokenizer, reader, wording, SETTINGS, seed=SEED, tiles=TILES)
    assert [(each.key, each.turn, each.prompt) for each in tiled.predictions] == [
        (each.key, each.turn, each.prompt) for each in whole.predictions
    ]
    for one, other in zip(tiled.predictions, whole.predictions, strict=True):
        assert other.truth_boxes_xyxy is not None or one == other, "free text is asked about the whole photo only"
    large = TilesConfig(side_px=56)
    assert (
        evaluate(model, tokenizer, reader, wording, SETTINGS, seed=SEED, tiles=large).predictions == whole.predictions
    )
