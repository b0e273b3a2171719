"""General questions before and during training, in one process with a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cogvlm_ft.config import load_config
from cogvlm_ft.errors import DataError
from cogvlm_ft.evaluate.generate import generate_answers
from cogvlm_ft.evaluate.probe import ProbeQuestion, ask_probe, load_probe, probe_metrics, run_probe
from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer, preprocess_image
from cogvlm_ft.runtime.distributed import device
from cogvlm_ft.settings import Config, EvaluateConfig

SETTINGS = EvaluateConfig(batch_size=2, max_new_tokens=6)


@pytest.fixture
def model(tiny_model: CogVLMForCausalLM) -> CogVLMForCausalLM:
    return tiny_model.to(device())


def write_probe(folder: Path, rows: list[dict[str, Any]]) -> Path:
    for number in range(3):
        Image.new("RGB", (60 + number, 40), (40 * number, 90, 200)).save(folder / f"{number}.png")
    path = folder / "probe.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    return path


THREE = [
    {"image": f"{number}.png", "prompt": prompt} for number, prompt in enumerate(["what?", "图里有什么?", "where?"])
]


def test_answers_come_in_the_order_of_the_questions(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, tmp_path: Path
) -> None:
    questions = load_probe(write_probe(tmp_path, THREE))
    found = ask_probe(model, tokenizer, questions, SETTINGS)
    model.eval()
    for question, answer in zip(questions, found, strict=True):
        with Image.open(question.image) as image:
            pixels = preprocess_image(image.convert("RGB"), 56)[None].to(device())
        with torch.no_grad():
            [[alone]] = generate_answers(model, tokenizer, pixels, [[question.prompt]], 6)
        assert alone.text == answer
    assert ask_probe(model, tokenizer, questions, replace(SETTINGS, batch_size=7)) == found


def config_of(tmp_path: Path, probe: Path) -> Config:
    fixed = ["model.path=m", "data.shards=s", f"output_dir={tmp_path / 'run'}", f"evaluate.probe={probe}"]
    return load_config(None, [*fixed, "evaluate.max_new_tokens=6"])


def test_what_the_untouched_model_said_is_right(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tmp_path, write_probe(tmp_path, THREE))
    assert run_probe(config, model, tokenizer, tmp_path / "before") == {}
    assert "3 questions are not scored" in caplog.text
    untouched = run_probe(config, model, tokenizer, tmp_path / "0", is_untouched=True)
    assert untouched == {"probe_chrf": pytest.approx(100), "probe_same": 1, "num_probe": 3}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.randn_like(parameter))  # all is forgotten
    later = run_probe(config, model, tokenizer, tmp_path / "1")
    assert later["probe_chrf"] < 90 and later["probe_same"] < 1
    rows = [json.loads(line) for line in (tmp_path / "1" / "probe.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["image"], row["prompt"]) for row in rows] == [(row["image"], row["prompt"]) for row in THREE]
    write_probe(tmp_path, THREE[:2])  # other questions than those that the untouched model was asked
    assert run_probe(config, model, tokenizer, tmp_path / "2") == {}


def test_without_a_probe_nothing_is_asked(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, tmp_path: Path) -> None:
    config = load_config(None, ["model.path=m", "data.shards=s", f"output_dir={tmp_path / 'run'}"])
    assert run_probe(config, model, tokenizer, tmp_path / "out") == {}
    assert list(tmp_path.iterdir()) == []


def test_given_answers_count_before_those_of_the_untouched_model() -> None:
    questions = [ProbeQuestion(Path("a"), "?", "a dog on a beach"), ProbeQuestion(Path("b"), "?")]
    assert probe_metrics(questions, ["a dog on a beach", "x"], None)["num_probe"] == 1
    found = probe_metrics(questions, [" a dog on a beach\n", "a tree"], ["a cat", "a bush"])
    assert (found["probe_same"], found["num_probe"]) == (0.5, 2)
    assert probe_metrics(questions[1:], ["x"], None) == {}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not valid JSON"),
        ("[1]", "line 1: found .*expected"),
        ('{"image": "0.png"}', "line 1: found .*expected"),
        ('{"image": "0.png", "prompt": " "}', "line 1: found .*expected"),
        ('{"image": "0.png", "prompt": "?", "answer": 3}', "line 1: found .*expected"),
        ('{"image": "9.png", "prompt": "?"}', "line 1: there is no image .*9.png"),
        ('{"image": "probe.jsonl", "prompt": "?"}', "probe.jsonl"),
        ("", "no questions; expected"),
    ],
)
def test_mistakes_are_explained(line: str, message: str, tmp_path: Path) -> None:
    path = write_probe(tmp_path, THREE)
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_probe(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"evaluate\.probe=.*nowhere\.jsonl: no such file"):
        load_probe(tmp_path / "nowhere.jsonl")
