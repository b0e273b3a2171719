"""Untrained models in grammar mode: whatever they would say, nothing of it is unreadable."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.evaluate.evaluate import build_grammar, evaluate
from cogvlm_ft.evaluate.generate import Answer, generate_answers
from cogvlm_ft.grounding.boxes import parse_boxes
from cogvlm_ft.grounding.grammar import BoxGrammar
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.launch.predict import main as predict
from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer
from cogvlm_ft.settings import EvaluateConfig

WORDING = load_wording("box")
PROMPTS = [["Where is the red circle?", "请指出蓝色方形的位置。"], ["图片中存在一只狗,所在区域为", "a", "dog dog"]]


def untrained(tiny_model: CogVLMForCausalLM, seed: int) -> CogVLMForCausalLM:
    torch.manual_seed(seed)
    for parameter in tiny_model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return tiny_model.eval().requires_grad_(False)


def answers_of(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, grammar: BoxGrammar | None, max_new_tokens: int
) -> list[Answer]:
    grammars = [[grammar] * len(prompts) for prompts in PROMPTS]
    pixels = torch.randn(len(PROMPTS), 3, 56, 56, generator=torch.Generator().manual_seed(0))
    rows = generate_answers(model, tokenizer, pixels, PROMPTS, max_new_tokens, grammars=grammars)
    return [answer for row in rows for answer in row]


def is_readable(text: str) -> bool:
    return parse_boxes(text) is not None or text.strip() in WORDING.not_found_sentences


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("max_new_tokens", [19, 64])
def test_no_answer_is_unreadable(
    tiny_model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, seed: int, max_new_tokens: int
) -> None:
    model = untrained(tiny_model, seed)
    free = answers_of(model, tokenizer, None, max_new_tokens)
    assert not any(is_readable(answer.text) for answer in free)
    held = answers_of(model, tokenizer, build_grammar(tokenizer, WORDING, "grammar", 0), max_new_tokens)
    assert all(is_readable(answer.text) for answer in held)
    assert all(len(answer.token_ids) == max_new_tokens for answer in held)  # cut off, and yet whole


@pytest.mark.parametrize("min_boxes", [1, 3])
def test_as_many_boxes_as_are_wanted(tiny_model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, min_boxes: int) -> None:
    grammar = build_grammar(tokenizer, WORDING, "grammar", min_boxes)
    for answer in answers_of(untrained(tiny_model, 1), tokenizer, grammar, 60):
        boxes = parse_boxes(answer.text) or []
        assert len(boxes) >= min_boxes
        assert all(x0 <= x1 and y0 <= y1 for x0, y0, x1, y1 in boxes)


def test_a_grammar_holds_its_own_turns_only(tiny_model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer) -> None:
    model, grammar = untrained(tiny_model, 2), build_grammar(tokenizer, WORDING, "grammar", 0)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    mixed = [[None, grammar], [grammar, None, None]]
    free = generate_answers(model, tokenizer, pixels, PROMPTS, 24)
    held = generate_answers(model, tokenizer, pixels, PROMPTS, 24, grammars=[[grammar] * len(row) for row in PROMPTS])
    found = generate_answers(model, tokenizer, pixels, PROMPTS, 24, grammars=mixed)
    wanted = [[free[0][0], held[0][1]], [held[1][0], free[1][1], free[1][2]]]
    assert [[a.token_ids for a in row] for row in found] == [[a.token_ids for a in row] for row in wanted]


def test_probabilities_are_those_of_the_model_and_not_of_the_grammar(
    tiny_model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer
) -> None:
    model, grammar = untrained(tiny_model, 3), build_grammar(tokenizer, WORDING, "grammar", 0)
    for answer in answers_of(model, tokenizer, grammar, 19):  # 19 leaves no choice but a box from the first token on
        assert answer.text.startswith("[[") and len(answer.token_ids) == 19
        assert max(answer.token_probs) < 0.9


def test_evaluation_counts_nothing_as_unreadable(
    tiny_model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, shards: Path
) -> None:
    """Turns that ask for no box are left free."""
    reader, model = ShardReader(load_index(shards, "val")), untrained(tiny_model, 0)
    settings = EvaluateConfig(max_samples=6, batch_size=3, max_new_tokens=24, num_pictures=0, decoding="grammar")
    found = evaluate(model, tokenizer, reader, WORDING, settings, seed=0)
    free_text = {each.prompt for each in found.predictions if each.truth_boxes_xyxy is None}
    assert free_text == {"How many shapes are there?"}
    about_boxes = [each for each in found.predictions if each.truth_boxes_xyxy is not None]
    assert about_boxes and all(is_readable(each.answer) for each in about_boxes)
    assert all(each.confidences is not None and 0 <= min(each.confidences) <= 1 for each in about_boxes)
    assert all(len(each.expected_boxes_xyxy or ()) == len(each.boxes_xyxy or ()) for each in about_boxes)


def test_predict(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (80, 60), (200, 30, 30)).save(tmp_path / "a.png")
    command = ["--model", tiny_folder, "--image", tmp_path / "a.png", "--prompt", "dog", "--out", tmp_path / "out.png"]
    more = ["--decoding", "grammar", "--min-boxes", 2, "--max-new-tokens", 40, "--reading", "expected"]
    assert predict([str(part) for part in (*command, *more)]) == 0
    printed = capsys.readouterr().out
    assert len(parse_boxes(printed) or ()) >= 2
    assert printed.count("box in pixels") >= 2 and "confidence 0." in printed
    assert predict([str(part) for part in (*command, "--min-boxes", 2)]) == 2
    assert "needs --decoding grammar" in capsys.readouterr().err


def test_an_answer_that_cannot_fit_is_refused_before_anything_is_asked(tokenizer: CogVLMTokenizer) -> None:
    with pytest.raises(ConfigError, match=r"max_new_tokens=34: 2 box\(es\) need up to 35 tokens"):
        build_grammar(tokenizer, WORDING, "grammar", 2).start(34)  # type: ignore[union-attr]
    assert build_grammar(tokenizer, WORDING, "free", 0) is None
