"""The forgetting probe of a run: what the untouched model said is kept in the run's folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogvlm_ft.config import Config
from cogvlm_ft.evaluate.probe import ProbeQuestion, ask_probe, load_probe, probe_metrics
from cogvlm_ft.model.tokenizer import CogVLMTokenizer
from cogvlm_ft.runtime.distributed import from_main, is_main

logger = logging.getLogger(__name__)

UNTOUCHED_FILE, ANSWERS_FILE = "probe_untouched.jsonl", "probe.jsonl"


def run_probe(
    config: Config, model: Any, tokenizer: CogVLMTokenizer, folder: Path, *, is_untouched: bool = False
) -> dict[str, float]:
    """Collective. The metrics of evaluate.probe, the same on every rank, {} without one; answers go to `folder`.

    is_untouched: this is the model before its first step, whose answers are the right ones from now on.
    """
    if config.evaluate.probe is None:
        return {}
    questions = load_probe(Path(config.evaluate.probe))
    answers = ask_probe(model, tokenizer, questions, config.evaluate)
    untouched_file = Path(config.output_dir) / UNTOUCHED_FILE
    if is_main():
        _write(folder / ANSWERS_FILE, questions, answers)
        if is_untouched:
            _write(untouched_file, questions, answers)
    untouched = from_main(_read(untouched_file, questions) if is_main() else None)
    num_open = sum(question.answer is None for question in questions)
    if is_main() and untouched is None and num_open:
        logger.warning(
            "evaluate.probe: %d questions are not scored: they have no answer, and %s holds none of the untouched model"
            " to these questions, which is asked at step 0 with evaluate.before_training=true",
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
    path.write_text(text, encoding="utf-8")


def _read(path: Path, questions: Sequence[ProbeQuestion]) -> list[str] | None:
    """The answers, or None if there are none to these very questions."""
    if not path.is_file():
        return None
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        same = [(row["image"], row["prompt"]) for row in rows] == [(each.image.name, each.prompt) for each in questions]
        return [str(row["answer"]) for row in rows] if same else None
    except (ValueError, KeyError, TypeError):
        return None
