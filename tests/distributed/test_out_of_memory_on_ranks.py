"""A training run that does not fit into memory ends with the arithmetic and a smaller micro-batch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ranks import run, started
from tiny import run_settings

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("limited.py")
LIMIT_BYTES = 1 << 30


def settings_of(shards: Path, model: Path, folder: Path, *more: str) -> list[str]:
    changes = ["train.global_batch_size=512", "train.max_steps=1", "model.gradient_checkpointing=none", "plan=ignore"]
    changes += ["evaluate.before_training=false", "evaluate.max_samples=1", "evaluate.max_new_tokens=1"]
    return run_settings(shards, model, folder, *changes, *more)


def test_the_message_names_a_smaller_micro_batch(shards: Path, start_model: Path, tmp_path: Path) -> None:
    settings = settings_of(shards, start_model, tmp_path / "run", "train.micro_batch_size=512")
    with started([PROGRAM, "AS", LIMIT_BYTES, *settings], 1, tmp_path / "logs") as ranks:
        assert ranks.wait(120) == [2], ranks.output()
        output = ranks.output()
    assert "ConfigError: rank 0 ran out of memory (RuntimeError: " in output
    assert re.search(r"Estimate of launch/plan\.py: training takes \S+ GiB of a rank \(\S+ weights", output)
    [fitting] = re.findall(r"What would fit: train\.micro_batch_size=(\d+)", output)
    assert 1 < int(fitting) < 512
    # Address space is more than memory (stacks of threads, arenas): what just fits by the arithmetic may not do here.
    smaller = ("train.micro_batch_size=16", "train.global_batch_size=16")
    settings = settings_of(shards, start_model, tmp_path / "again", *smaller)
    run([PROGRAM, "AS", LIMIT_BYTES, *settings], 1, tmp_path / "logs")
