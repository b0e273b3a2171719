"""An examination of this machine, and copies of model and shards that a test may break."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from examining import Examine

from cogvlm_ft.config import load_config
from cogvlm_ft.doctor import storage
from cogvlm_ft.doctor.examination import (
    Check,
    begin,
    examine,
)
from cogvlm_ft.runtime.bandwidth import SideChannel


@pytest.fixture
def model(start_model: Path, tmp_path: Path) -> Path:
    """A copy, to be broken."""
    return Path(shutil.copytree(start_model, tmp_path / "model"))


@pytest.fixture
def set_of_shards(shards: Path, tmp_path: Path) -> Path:
    """A copy, to be broken."""
    return Path(shutil.copytree(shards, tmp_path / "shards"))


@pytest.fixture
def run_checks(
    start_model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Examine:
    """Examine this process's machine: checks, settings -> (number of red lines, what was printed)."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no-config"))

    def run(checks: list[Check], *settings: str, all_shards: bool = False, fix: bool = False) -> tuple[int, str]:
        usual = [f"model.path={start_model}", f"data.shards={shards}", f"output_dir={tmp_path / 'run'}"]
        usual += ["deepspeed=configs/deepspeed/zero3_tiny.json", "tracking.mode=disabled"]
        config = load_config(None, [*usual, *settings])
        channel = SideChannel()
        examination = begin(config, channel, all_shards=all_shards, fix=fix)
        capsys.readouterr()
        num_red = examine(examination, channel, checks)
        storage.remove_probes(examination)
        return num_red, capsys.readouterr().out

    return run
