"""A run that is killed repeatedly, at any moment, ends as if it had not been disturbed.

SOAK_KILLS=50 pytest -m slow tests/soak          (make soak)
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import Ranks, read_metrics, run, started

from cogvlm_ft.checkpoints.checkpoint import list_checkpoints
from cogvlm_ft.checkpoints.slices import MOMENTS, WEIGHT, open_slices
from cogvlm_ft.model.loading import read_whole

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
NUM_KILLS = int(os.environ.get("SOAK_KILLS", "2"))
LAST_STEPS = 3  # after the last kill: the run is as long as the kills let it become
STEPS_PER_EPOCH = 5
START_UP_S, PATIENCE_S = 12, 120
# loss_spike: compares with the losses since the last start.
VOLATILE = ("_per_s", "_s", "_fraction", "tflops", "mfu", "memory", "slowest", "loss_spike")

SAMPLE_LOSSES = "sample_losses"


def settings(shards: Path, start_model: Path, output_dir: Path) -> list[str]:
    return [
        "launch/train.py",
        f"output_dir={output_dir}",
        f"model.path={start_model}",
        f"data.shards={shards}",
        "plan=ignore",
        "data.num_workers=1",
        "train.epochs=10000",
        "train.warmup_fraction=0",
        "train.min_lr_ratio=1",  # a constant rate: the number of steps is not known before
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "train.lr=1e-3",
        "train.patience=null",
        "evaluate.max_samples=4",
        "evaluate.max_new_tokens=6",
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=2",
        "tracking.mode=disabled",
    ]


def number_of_rows(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def starting(folder: Path, chance: random.Random) -> Callable[[], bool]:
    """Kill in the first seconds: during imports, or while the model or the checkpoint is loaded."""
    due = time.monotonic() + chance.uniform(0.5, START_UP_S)
    return lambda: time.monotonic() > due


def stepping(folder: Path, chance: random.Random) -> Callable[[], bool]:
    """Kill soon after another row is written."""
    expected, wait_s = number_of_rows(folder) + chance.randrange(1, 3), chance.uniform(0, 0.5)

    def is_due() -> bool:
        due = number_of_rows(folder) >= expected
        if due:
            time.sleep(wait_s)
        return due

    return is_due


def saving(folder: Path, chance: random.Random) -> Callable[[], bool]:
    """Kill while a checkpoint is written, hashed or published."""
    old, wait_s = set((folder / "checkpoints").glob(".tmp-step-*")), chance.uniform(0, 0.05)

    def is_due() -> bool:
        due = bool(set((folder / "checkpoints").glob(".tmp-step-*")) - old)
        if due:
            time.sleep(wait_s)
        return due

    return is_due


def pruning(folder: Path, chance: random.Random) -> Callable[[], bool]:
    """Kill right after a new checkpoint appears, when an old one is deleted."""
    old = set((folder / "checkpoints").glob("step-*"))
    return lambda: bool(set((folder / "checkpoints").glob("step-*")) - old)


def evaluating(folder: Path, chance: random.Random) -> Callable[[], bool]:
    """Kill after the last step of an epoch, usually during the evaluation."""
    wait_s = chance.uniform(0.05, 0.6)
    last_step = (last_step_of(folder) // STEPS_PER_EPOCH + 1) * STEPS_PER_EPOCH

    def is_due() -> bool:
        due = number_of_rows(folder) > 0 and bool(
            [row for row in read_rows(folder) if row["kind"] == "train" and row["step"] >= last_step]
        )
        if due:
            time.sleep(wait_s)
        return due

    return is_due


def read_rows(folder: Path) -> list[dict]:
    """Read whole lines only: the run may be writing."""
    content = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in content[: content.rfind("\n") + 1].splitlines()]


def loading(folder: Path, chance: random.Random) -> Callable[[], bool]:
    """Kill after the state is loaded, while the first batch is read by workers that are just starting."""
    old, wait_s = time_of(folder / "config.yaml"), chance.uniform(0, 0.6)

    def is_due() -> bool:
        due = time_of(folder / "config.yaml") != old
        if due:
            time.sleep(wait_s)
        return due

    return is_due


def beside_rival(folder: Path, chance: random.Random) -> Callable[[], bool]:
    """Start a second job on the folder after another row is written, and kill the first one meanwhile."""
    return stepping(folder, chance)


def time_of(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def last_step_of(folder: Path) -> int:
    rows = read_rows(folder) if (folder / "metrics.jsonl").exists() else []
    return max([0, *(row["step"] for row in rows if row["kind"] == "train")])


MOMENTS_TO_KILL = (saving, beside_rival, stepping, starting, pruning, evaluating, loading)


def kill(ranks: Ranks, chance: random.Random) -> str:
    """Kill one rank or all; soon afterwards, as a launcher would, those that remain."""
    victims = chance.choice([[0], [1], [0, 1]])
    for number in victims:
        os.killpg(ranks.processes[number].pid, signal.SIGKILL)
    time.sleep(chance.uniform(0, 2))
    ranks.kill()
    return f"ranks {victims}"


def test_a_run_that_is_killed_again_and_again_ends_as_if_undisturbed(
    shards: Path, start_model: Path, tmp_path: Path
) -> None:
    chance = random.Random(NUM_KILLS)
    folder = tmp_path / "killed"
    arguments = settings(shards, start_model, folder)
    for number in range(NUM_KILLS):
        moment = MOMENTS_TO_KILL[number % len(MOMENTS_TO_KILL)]
        is_due, deadline = moment(folder, chance), time.monotonic() + PATIENCE_S
        with started(arguments, 2, tmp_path / "logs", fresh=moment is starting) as ranks:  # imports too
            while not is_due():
                assert time.monotonic() < deadline, f"{moment.__name__} did not come\n{ranks.output()}"
                assert all(process.poll() is None for process in ranks.processes), ranks.output()
                time.sleep(0.005)
            if moment is beside_rival:
                killed = kill_beside(arguments, tmp_path / "logs", ranks, chance)
            else:
                killed = kill(ranks, chance)
            print(f"{number}: {moment.__name__}: killed {killed} at row {number_of_rows(folder)}")
    num_steps = last_step_of(folder) + LAST_STEPS
    run([*arguments, f"train.max_steps={num_steps}"], 2, tmp_path / "logs")
    undisturbed = [*settings(shards, start_model, tmp_path / "undisturbed"), f"train.max_steps={num_steps}"]
    run(undisturbed, 2, tmp_path / "logs")
    assert_same_run(folder, tmp_path / "undisturbed", num_steps)


def kill_beside(arguments: list[str], logs: Path, first: Ranks, chance: random.Random) -> str:
    """Kill the first job while a second one starts: that one is refused, or takes the folder over and is killed too."""
    with started(arguments, 2, logs) as rival:
        time.sleep(chance.uniform(0, START_UP_S / 2))
        killed = kill(first, chance)
        time.sleep(chance.uniform(0, 3))
        codes = [process.poll() for process in rival.processes]
        assert codes in ([None, None], [2, 2], [None, 2], [2, None]), rival.output()
        return f"{killed} beside a job that {'was refused' if 2 in codes else 'took over'}"


def assert_same_run(found: Path, expected: Path, num_steps: int) -> None:
    """Compare every logged number except clocks and memory, bit for bit, and every tensor; every sample must have been
    seen exactly once per epoch.
    """
    for kind in ("train", "val"):
        a, b = (
            [
                {k: v for k, v in row.items() if not any(part in k for part in VOLATILE)}
                for row in read_metrics(run, kind)
            ]
            for run in (found, expected)
        )
        assert a == b
    last = [list_checkpoints(run / "checkpoints")[-1] for run in (found, expected)]
    assert last[0].name == last[1].name == f"step-{num_steps:08d}"
    for kind in (WEIGHT, *MOMENTS):
        a, b = (open_slices(path, kind) for path in last)
        assert a.keys() == b.keys()
        assert all(read_whole(a[name], torch.float32).equal(read_whole(b[name], torch.float32)) for name in a)
    seen = [keys_seen(run) for run in (found, expected)]
    assert seen[0] == seen[1]
    assert set(seen[0].values()) == {1}  # every sample of every epoch
    assert not list((found / "checkpoints").glob("*tmp*")) and not list((found / "checkpoints").glob("damaged-*"))


def keys_seen(folder: Path) -> Counter:
    """Return how often each (epoch, sample) was seen."""
    rows = [
        json.loads(line)
        for path in (folder / SAMPLE_LOSSES).glob("*.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return Counter((row["epoch"], row["key"]) for row in rows)
