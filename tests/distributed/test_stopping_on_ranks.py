"""When a run on two ranks stops: by a weighted composite, and on request while it is evaluated."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from PIL import Image
from ranks import read_metrics, run, started, wait_for_step
from run_states import assert_same_end
from tiny import run_settings

from cogvlm_ft.checkpoints.checkpoint import list_checkpoints, read_state
from cogvlm_ft.model.fingerprint import fingerprint

pytestmark = pytest.mark.slow


def test_no_gain_in_the_composite_ends_the_training(shards: Path, start_model: Path, tmp_path: Path) -> None:
    """Give two ranks one question: one of them has none."""
    Image.new("RGB", (50, 40), (200, 60, 30)).save(tmp_path / "a.png")
    (tmp_path / "probe.jsonl").write_text(json.dumps({"image": "a.png", "prompt": "what is it?"}) + "\n")
    folder = tmp_path / "run"
    changes = [
        "train.monitor={mean_iou: 1.0, unreadable: 0.5, probe_same: 0.25}",
        "train.min_gain=10",  # more than a composite of fractions can gain
        "train.patience=1",
        f"evaluate.probe={tmp_path / 'probe.jsonl'}",
        "evaluate.max_samples=3",
    ]
    settings = run_settings(shards, start_model, folder, *changes)
    run(["launch/train.py", *settings], 2, tmp_path / "logs")
    before, after = read_metrics(folder, "val")
    assert (before["epoch"], after["epoch"]) == (0, 1)
    for row in (before, after):
        assert row["monitor"] == pytest.approx(row["mean_iou"] - 0.5 * row["unreadable"] + 0.25 * row["probe_same"])
        assert row["best_monitor"] == before["monitor"]
    assert (before["probe_same"], before["num_probe"]) == (1, 1)
    state = read_state(list_checkpoints(folder / "checkpoints")[-1])
    assert (state.step, state.best.step, state.best.num_since) == (after["step"], 0, 1)
    written = json.loads((folder / "evaluations" / f"step-{after['step']:08d}" / "metrics.json").read_text())
    assert written["probe_chrf"] == after["probe_chrf"]
    assert (written["about"]["step"], written["about"]["config_sha256"]) == (after["step"], state.config_sha256)

    out = tmp_path / "scores"
    scoring = ["launch/evaluate.py", "--config", folder / "config.yaml", "--out", out, "--untouched"]
    run([*scoring, "--protocol", "qwen_vl"], 1, tmp_path)
    scores = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert scores["probe_same"] == 1  # this is the untouched model, whose answers lie in the run's folder
    assert "mean_iou" in scores and "ap" not in scores and "mean_iou/language=zh" in scores
    assert scores["about"]["protocol"] == "qwen_vl" and scores["about"]["checkpoint"] == str(start_model)
    assert scores["about"]["checkpoint_sha256"] == fingerprint(start_model)


def one_epoch(shards: Path, start_model: Path, folder: Path) -> list[str]:
    """Return the command of an epoch of five steps, whose evaluation takes seconds."""
    long = [
        "data.num_workers=2",
        "evaluate.before_training=false",
        "evaluate.batch_size=1",
        "evaluate.max_new_tokens=50",
    ]
    return ["launch/train.py", *run_settings(shards, start_model, folder, "train.epochs=1", *long)]


@pytest.fixture(scope="module")
def undisturbed(shards: Path, start_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(one_epoch(shards, start_model, folder / "run"), 2, folder / "logs")
    return folder / "run"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_evaluation_that_is_disturbed_costs_no_epoch(
    number: signal.Signals, undisturbed: Path, shards: Path, start_model: Path, tmp_path: Path
) -> None:
    """A request to stop ends the evaluation after a batch; a kill ends it at once. The next start repeats it.

    The signal reaches the ranks and their loader processes, as from Slurm or docker.
    """
    disturbed, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    with started(one_epoch(shards, start_model, disturbed), 2, tmp_path / "logs") as ranks:
        deadline = time.monotonic() + 120
        while not any(checkpoints.glob("*step-00000005")):  # being written, or written
            assert time.monotonic() < deadline, ranks.output()
            time.sleep(0.01)
        time.sleep(0.3)
        for process in ranks.processes:
            os.killpg(process.pid, number)
        assert ranks.wait() == ([-9, -9] if number == signal.SIGKILL else [0, 0]), ranks.output()
    assert read_metrics(disturbed, "val") == []
    if number == signal.SIGTERM:
        state = read_state(list_checkpoints(checkpoints)[-1])
        assert (state.step, state.evaluated_step) == (5, -1)
    run(one_epoch(shards, start_model, disturbed), 2, tmp_path / "logs")
    assert_same_end(disturbed, undisturbed)
    states = [read_state(list_checkpoints(run / "checkpoints")[-1]) for run in (disturbed, undisturbed)]
    assert states[0].evaluated_step == states[1].evaluated_step == 5
    assert states[0].best == states[1].best


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_whole_process_group_stops_and_saves(
    number: signal.Signals, shards: Path, start_model: Path, tmp_path: Path
) -> None:
    """Slurm, docker and `kill -- -PGID` also signal the loader processes, which must go on until the rank ends."""
    settings = run_settings(shards, start_model, tmp_path / "run", "data.num_workers=2", "train.max_steps=500")
    arguments = ["launch/train.py", *settings, "train.epochs=100", "evaluate.before_training=false"]
    with started(arguments, 2, tmp_path / "logs") as ranks:
        wait_for_step(tmp_path / "run", 2, ranks)
        for process in ranks.processes:
            os.killpg(process.pid, number)
        assert ranks.wait(60) == [0, 0], ranks.output()
        assert "DataLoader worker" not in ranks.output()
    [checkpoint] = list_checkpoints(tmp_path / "run" / "checkpoints")[-1:]
    assert read_state(checkpoint).step == read_metrics(tmp_path / "run", "train")[-1]["step"] < 500
