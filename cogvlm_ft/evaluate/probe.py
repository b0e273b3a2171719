"""Measure forgetting: ask the same general questions before and during training, and compare the answers.

    probe.jsonl of the user     {"image": "a.jpg", "prompt": "What is in the picture?", "answer": "A dog on a beach."}

Without an "answer", the answer of the untouched model is the right one. Paths are relative to the file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cogvlm_ft.data.frames import photo_frame
from cogvlm_ft.data.reader import MAX_PIXELS, decode_image
from cogvlm_ft.data.transforms import model_input, resize_of
from cogvlm_ft.errors import DataError
from cogvlm_ft.evaluate.generate import generate_answers
from cogvlm_ft.evaluate.survey import with_margin
from cogvlm_ft.grounding.descriptions import corpus_chrf
from cogvlm_ft.model.tokenizer import CogVLMTokenizer
from cogvlm_ft.plain_files import parse_json, read_bytes, write_text
from cogvlm_ft.run_folder import RunFolder
from cogvlm_ft.runtime.distributed import device, from_main, gather_to_main, is_main, rank, world_size
from cogvlm_ft.runtime.engine import inference
from cogvlm_ft.runtime.param_gathering import parameters_gathered
from cogvlm_ft.runtime.stop_signals import StopRequest, stopping_together
from cogvlm_ft.settings import Config, EvaluateConfig
from cogvlm_ft.tracking.auxiliary import failures_as_warnings

logger = logging.getLogger(__name__)

ANSWERS_FILE = "probe.jsonl"
LEAST_TOKENS = 128  # of an answer, where evaluate.max_new_tokens leaves it open


@dataclass(frozen=True)
class ProbeQuestion:
    """answer: the right one; None = that of the untouched model."""

    image: Path
    prompt: str
    answer: str | None = None


def load_probe(path: Path) -> list[ProbeQuestion]:
    """Load all questions. Raises DataError with the line, also for an unreadable image, before any rank asks."""
    if not path.is_file():
        raise DataError(f"evaluate.probe={path}: no such file; expected JSON lines, on every node. Check the path")
    questions = []
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except ValueError as error:
        raise DataError(f"evaluate.probe={path}: {error}; expected JSON lines in UTF-8. Save it as UTF-8") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            questions.append(_question(line, path, f"evaluate.probe={path}, line {number}"))
    if not questions:
        raise DataError(f"evaluate.probe={path}: no questions; expected lines with image and prompt")
    return questions


def _question(line: str, path: Path, place: str) -> ProbeQuestion:
    try:
        fields = parse_json(line)
    except ValueError as error:
        raise DataError(f"{place}: not valid JSON ({error})") from None
    answer = fields.get("answer") if isinstance(fields, dict) else None
    texts = [fields.get("image"), fields.get("prompt")] if isinstance(fields, dict) else [None]
    good = all(isinstance(text, str) and text.strip() for text in (*texts, "-" if answer is None else answer))
    if not good:
        raise DataError(
            f'{place}: found {line:.200}; expected {{"image": path, "prompt": text}}, optionally "answer": text'
        )
    question = ProbeQuestion(path.parent / fields["image"], fields["prompt"], answer)
    if not question.image.is_file():
        raise DataError(f"{place}: there is no image {question.image}")
    _read_image(question)
    return question


def _read_image(question: ProbeQuestion) -> Image.Image:
    return decode_image(question.image.read_bytes(), str(question.image), MAX_PIXELS, upright=True)


def ask_probe(
    model: Any,
    tokenizer: CogVLMTokenizer,
    questions: Sequence[ProbeQuestion],
    settings: EvaluateConfig,
    stop_request: StopRequest | None = None,
) -> list[str]:
    """Answer the questions, on every rank. Collective: a rank without questions asks about a blank image.

    stop_request: checked before every batch; raises StopRequested.
    """
    mine = range(rank(), len(questions), world_size())
    longest = max(len(tokenizer.encode(question.answer or "")) + 1 for question in questions)
    limit = settings.max_new_tokens or max(LEAST_TOKENS, with_margin(longest))
    answers: list[tuple[int, str]] = []
    with inference(model), parameters_gathered(model, settings.gather):
        for start in range(0, -(-len(questions) // world_size()), settings.batch_size):
            numbers = mine[start : start + settings.batch_size]
            with stopping_together(stop_request, DataError, OSError):  # images may be gone by now, on one node alone
                pixels = [_pixels(model, questions[i]) for i in numbers]
            pixels = pixels or [torch.zeros(3, *2 * [model.config.image_size])]
            prompts = [[questions[i].prompt] for i in numbers] or [["?"]]
            found = generate_answers(model, tokenizer, torch.stack(pixels).to(device()), prompts, limit)
            answers += [(i, answer.text) for i, [answer] in zip(numbers, found, strict=False)]
    gathered = gather_to_main(answers)
    ordered = sorted(pair for part in gathered for pair in part) if gathered is not None else []
    return from_main([text for _, text in ordered])


def _pixels(model: Any, question: ProbeQuestion) -> torch.Tensor:
    image, size = _read_image(question), model.config.image_size
    return model_input(image, photo_frame(image.size, resize_of(model.config)), size)


def probe_metrics(
    questions: Sequence[ProbeQuestion], answers: Sequence[str], untouched: Sequence[str] | None
) -> dict[str, float]:
    """Compute probe_chrf (0 to 100) and probe_same, the fraction of equal answers.

    untouched: answers of the untouched model.
    Without them, only questions with an answer of their own are scored; empty if there are none.
    """
    first: Sequence[str | None] = untouched if untouched is not None else [None] * len(questions)
    pairs = [
        (said.strip(), right.strip())
        for question, said, before in zip(questions, answers, first, strict=True)
        if (right := question.answer if question.answer is not None else before) is not None
    ]
    if not pairs:
        return {}
    said_texts, right_texts = zip(*pairs, strict=True)
    return {
        "probe_chrf": corpus_chrf(said_texts, right_texts),
        "probe_same": sum(said == right for said, right in pairs) / len(pairs),
        "num_probe": float(len(pairs)),
    }


def run_probe(
    config: Config,
    model: Any,
    tokenizer: CogVLMTokenizer,
    folder: Path,
    *,
    is_untouched: bool = False,
    stop_request: StopRequest | None = None,
) -> dict[str, float]:
    """Compute the metrics of evaluate.probe, the same on every rank, {} without it; answers go to `folder`. Collective.

    is_untouched: the model before its first step, whose answers are the right ones later. stop_request: as in evaluate.
    """
    if config.evaluate.probe is None:
        return {}
    with stopping_together(stop_request, DataError, OSError):
        questions = load_probe(Path(config.evaluate.probe).expanduser())
    answers = ask_probe(model, tokenizer, questions, config.evaluate, stop_request)
    untouched_file = RunFolder(config.output_path).untouched_probe
    if is_main():
        with failures_as_warnings("answers of evaluate.probe"):
            _write(folder / ANSWERS_FILE, questions, answers)
            if is_untouched:
                _write(untouched_file, questions, answers)
    untouched = from_main(_read(untouched_file, questions) if is_main() else None)
    num_open = sum(question.answer is None for question in questions)
    if is_main() and untouched is None and num_open:
        logger.warning(
            "evaluate.probe: %d questions are not scored: they have no answer, and %s holds no answers of the untouched"
            " model to them. Train with evaluate.before_training=true, which asks it at step 0",
            num_open,
            untouched_file,
        )
    return probe_metrics(questions, answers, untouched)


def _write(path: Path, questions: Sequence[ProbeQuestion], answers: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"image": question.image.name, "prompt": question.prompt, "answer": answer}
        for question, answer in zip(questions, answers, strict=True)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(path, text)


def _read(path: Path, questions: Sequence[ProbeQuestion]) -> list[str] | None:
    """Read the answers; None if there are none to exactly these questions."""
    try:
        if not path.is_file():
            return None
        rows = [parse_json(line) for line in read_bytes(path).decode("utf-8").splitlines()]
        same = [(row["image"], row["prompt"]) for row in rows] == [(each.image.name, each.prompt) for each in questions]
        return [str(row["answer"]) for row in rows] if same else None
    except OSError as error:
        logger.warning("evaluate.probe: the answers of the untouched model cannot be read: %s", error)
        return None
    except (ValueError, KeyError, TypeError):
        return None
