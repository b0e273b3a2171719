"""A run folder written before the rooms were rearranged resumes, evaluates, exports and reports with today's code.

tests/old_run/ holds it: two steps of a tiny model, `config.yaml` with a path as `deepspeed`, and the start model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from ranks import read_metrics, run

from cogvlm_ft.checkpoints.checkpoint import list_checkpoints
from cogvlm_ft.config import load_config
from cogvlm_ft.data.reader import open_split
from cogvlm_ft.launch.export import main as export
from cogvlm_ft.launch.report import main as report
from cogvlm_ft.model import load_model
from cogvlm_ft.shards.build import main as build
from cogvlm_ft.shards.demo_scenes import write_scenes

pytestmark = pytest.mark.slow
OLD_RUN = Path(__file__).parents[1] / "old_run"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the old run and its start model, and its shards, built again."""
    folder = tmp_path_factory.mktemp("old")
    shutil.copytree(OLD_RUN, folder, dirs_exist_ok=True)
    annotations = write_scenes(folder / "scenes", 8, 56, seed=3)
    arguments = ["--format", "jsonl", "--images", folder / "scenes", "--annotations", annotations]
    arguments += ["--out", folder / "shards", "--val-fraction", 0.25, "--workers", 1]
    assert build([str(argument) for argument in arguments]) == 0
    return folder


def paths_of(folder: Path) -> list[str]:
    return [f"output_dir={folder / 'run'}", f"data.shards={folder / 'shards'}", f"model.path={folder / 'start'}"]


def test_the_shards_are_the_same_to_the_byte(folder: Path) -> None:
    recorded = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))["config"]
    config = load_config(folder / "run" / "config.yaml", paths_of(folder))
    assert open_split(config, "train").index.data_sha256 == recorded["data_sha256"]
    assert open_split(config, "val").index.data_sha256 == recorded["val_data_sha256"]


def test_it_reports_evaluates_exports_and_resumes(folder: Path, tmp_path: Path) -> None:
    old, settings = folder / "run", ["--config", folder / "run" / "config.yaml", *paths_of(folder)]
    [checkpoint] = list_checkpoints(old / "checkpoints")
    rows = read_metrics(old, "train")
    assert report([str(old), f"data.shards={folder / 'shards'}"]) == 0
    page = (old / "report.html").read_text(encoding="utf-8")
    assert 'id="curves"' in page and "<image " in page

    printed = run(["launch/evaluate.py", *settings, "--checkpoint", old, "--out", tmp_path / "scores"], 1, tmp_path)
    assert f"scoring {checkpoint} on split val of {folder / 'shards'}, wording box" in printed
    scores, before = (
        json.loads((place / "metrics.json").read_text(encoding="utf-8"))
        for place in (tmp_path / "scores", old / "evaluations" / "step-00000002")
    )
    numbers = {name: value for name, value in before.items() if isinstance(value, float)}
    assert len(numbers) > 20 and {name: scores.get(name) for name in numbers} == pytest.approx(numbers, nan_ok=True)

    assert export(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "exported")]) == 0
    assert load_model(tmp_path / "exported").config.num_hidden_layers == 1

    run(["launch/train.py", *settings, "train.max_steps=3"], 1, tmp_path)
    assert read_metrics(old, "train")[: len(rows)] == rows
    assert [row["step"] for row in read_metrics(old, "train")] == [1, 2, 3]
