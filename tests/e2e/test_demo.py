"""`launch/demo.py` at a small size: every step runs, and every path that it prints exists."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import REPOSITORY, TIMEOUT_S, run_program

pytestmark = pytest.mark.slow


def test_demo(tmp_path: Path) -> None:
    command = ["launch/demo.py", "--num-scenes", "120", f"output_dir={tmp_path}/run"]
    command += [f"model.path={tmp_path}/start", f"data.shards={tmp_path}/shards", "train.max_steps=2"]
    command += ["evaluate.max_samples=4", "evaluate.max_new_tokens=4"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    result = run_program(command, environment=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    shown = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if str(tmp_path) in line)
    for name in ("report", "checkpoint", "metrics", "predictions", "images"):
        assert Path(shown[name]).exists(), name
    assert any((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_a_stopped_demo_saves_and_is_not_shown_as_finished(tmp_path: Path) -> None:
    command = [sys.executable, "launch/demo.py", "--num-scenes", "120", f"output_dir={tmp_path}/run"]
    command += [f"model.path={tmp_path}/start", f"data.shards={tmp_path}/shards", "train.epochs=1000"]
    command += ["evaluate.before_training=false", "tracking.mode=disabled", "train.log_every=1"]
    log = tmp_path / "run" / "metrics.jsonl"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    demo = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)
    with demo:
        try:
            wait_until(lambda: log.exists() and log.stat().st_size > 0, demo)
            demo.send_signal(signal.SIGINT)
            printed = demo.communicate(timeout=TIMEOUT_S)[0]
        finally:
            demo.kill()
    assert demo.returncode == 0
    assert "mean IoU" not in printed and "To export the model" not in printed
    assert any((tmp_path / "run" / "checkpoints").glob("step-*"))
    resumed = shlex.split(printed.partition("The demo is not finished; to resume it, run:\n")[2])
    assert resumed[2:] == ["cogvlm_ft.launch.demo", *command[2:]]


def wait_until(is_so: Callable[[], bool], demo: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert demo.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
