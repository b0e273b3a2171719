"""`launch/demo.py` at a small size: every step runs, and every path that it prints exists."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ranks import run_program

pytestmark = pytest.mark.slow


def test_demo(tmp_path: Path) -> None:
    command = ["launch/demo.py", "--num-scenes", "120", f"output_dir={tmp_path}/run"]
    command += [f"model.path={tmp_path}/start", f"data.shards={tmp_path}/shards", "train.max_steps=2"]
    command += ["evaluate.max_samples=4", "evaluate.max_new_tokens=4"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    result = run_program(command, environment=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    shown = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if str(tmp_path) in line)
    for name in ("checkpoint", "metrics", "predictions", "images"):
        assert Path(shown[name]).exists(), name
    assert any((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
