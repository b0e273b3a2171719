"""Training runs on two ranks that many tests read. A test that changes one takes a copy."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run
from reference import reference_settings


@pytest.fixture(scope="session")
def reference_run(shards: Path, start_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an undisturbed run: ten steps, four epochs, a checkpoint of every second step and epoch."""
    folder = tmp_path_factory.mktemp("reference")
    run(["launch/train.py", *reference_settings(shards, start_model, folder / "run")], 2, folder / "logs")
    return folder / "run"


@pytest.fixture(scope="session")
def bf16_run(shards: Path, start_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the same run in bf16 with fp32 master weights."""
    folder = tmp_path_factory.mktemp("bf16")
    settings = reference_settings(shards, start_model, folder / "run", "train.precision=bf16")
    run(["launch/train.py", *settings], 2, folder / "logs")
    return folder / "run"
