"""Which weights launch/evaluate.py scores, and where it may write."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pytest

from cogvlm_ft.checkpoints.checkpoint import MANIFEST_FILE, STATE_FILE, Best, TrainState
from cogvlm_ft.config import load_config
from cogvlm_ft.errors import CheckpointError, ConfigError
from cogvlm_ft.evaluate.output import prepare_output
from cogvlm_ft.launch.evaluate import choose_weights

FIXED = ["model.path=start", "data.shards=s"]


def write_run(run: Path, best: int) -> None:
    for step in (4, 8):
        checkpoint = run / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        state = TrainState(step=step, best=Best(0.5, best))
        (checkpoint / STATE_FILE).write_text(json.dumps(dataclasses.asdict(state)), encoding="utf-8")
        (checkpoint / MANIFEST_FILE).write_text("{}", encoding="utf-8")
    (run / "config.yaml").write_text("", encoding="utf-8")


def chosen(run: Path, *settings: str, config: Path | str = "grounding_490", **given: object) -> Path:
    known = {"checkpoint": None, "untouched": False, **given}
    args = argparse.Namespace(config=str(config), settings=list(settings), **known)
    return choose_weights(load_config(None, [*FIXED, f"output_dir={run}", *settings]), args)


def test_a_run_is_scored_by_its_best_checkpoint(tmp_path: Path) -> None:
    write_run(tmp_path / "run", best=4)
    best = tmp_path / "run" / "checkpoints" / "step-00000004"
    assert chosen(tmp_path / "run") == chosen(tmp_path / "run", "evaluate.max_samples=3") == best
    assert chosen(tmp_path / "moved away", config=tmp_path / "run" / "config.yaml") == best
    assert chosen(tmp_path, checkpoint=tmp_path / "run") == chosen(tmp_path, checkpoint=best) == best
    assert chosen(tmp_path / "run", "model.path=exported") == Path("exported")
    assert chosen(tmp_path / "run", untouched=True) == chosen(tmp_path / "new") == Path("start")
    with pytest.raises(ConfigError, match="--checkpoint, --untouched: found both"):
        chosen(tmp_path / "run", checkpoint=best, untouched=True)
    with pytest.raises(CheckpointError, match=r"--checkpoint .*absent: found no such folder; expected"):
        chosen(tmp_path, checkpoint=tmp_path / "absent")


def test_results_are_never_overwritten_and_a_place_is_tried_first(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "scores"
    prepare_output(out)
    prepare_output(out)
    assert list(out.iterdir()) == []
    (out / "metrics.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"found metrics\.json of an earlier evaluation; expected a new folder"):
        prepare_output(out)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out .*Not a directory; expected a folder that can be written"):
        prepare_output(tmp_path / "file" / "scores")
