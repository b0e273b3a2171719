"""Training jobs on a virtual cluster: submit them, wait for a step, find their processes, compare their results."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from cluster import Cluster
from ranks import read_metrics

from cogvlm_ft.checkpoints.checkpoint import list_checkpoints

NUM_STEPS = 16
PLACE = ("--nodes=2", "--nodelist=node[1-2]", "--gres=gpu:1", "--ntasks-per-node=1", "--cpus-per-task=1")
COMPARED = ("step", "epoch", "loss", "grad_norm", "lr")


@dataclass(frozen=True)
class Job:
    """One training job; `output_dir` is its run's folder."""

    cluster: Cluster
    number: str
    output_dir: Path

    @property
    def log(self) -> str:
        path = self.cluster.checkout / f"slurm-{self.number}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    @property
    def run_minutes(self) -> int:
        """Whole minutes since its start; no test takes an hour."""
        return int(self.cluster.job(self.number)["RunTime"].split(":")[1])

    def wait_for_log(self, text: str, timeout_s: float = 300) -> None:
        self.cluster.wait_until(lambda: text in self.log, f"job {self.number} logs {text!r}", timeout_s, 0.05)

    def attempt_log(self, number: int) -> str:
        """Return what attempt `number` logged, from 1; nothing if there was no such attempt."""
        parts = re.split(r"attempt (\d+) on ", self.log)
        return "".join(text for found, text in zip(parts[1::2], parts[2::2], strict=True) if int(found) == number)

    def wait_for_attempt(self, number: int) -> None:
        self.wait_for_log(f"attempt {number} on ")

    @property
    def last_step(self) -> int:
        rows = read_metrics(self.output_dir, "train") if (self.output_dir / "metrics.jsonl").exists() else []
        return int(rows[-1]["step"]) if rows else 0

    def wait_for_step(self, step: int) -> None:
        self.cluster.wait_until(lambda: self.last_step >= step, f"job {self.number} is at step {step}", 300, 0.05)

    def wait_for_end(self, state: str = "COMPLETED", timeout_s: float = 900) -> None:
        """Wait until it is over; it must end in `state`."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
        found = self.cluster.wait_until(lambda: self.state in over and self.state, f"job {self.number} ends", timeout_s)
        assert found == state, f"{found}\n{self.log}"

    def ranks(self) -> dict[int, psutil.Process]:
        """Return its training processes by rank, on all nodes."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                if "launch/train.py" in command[1:2] and f"output_dir={self.output_dir}" in command:
                    found[int(process.environ()["SLURM_PROCID"])] = process
        return found

    def wait_for_ranks(self) -> dict[int, psutil.Process]:
        def both() -> dict[int, psutil.Process] | None:
            ranks = self.ranks()
            return ranks if sorted(ranks) == [0, 1] else None

        return self.cluster.wait_until(both, f"both ranks of job {self.number} run", 300, 1)

    @contextlib.contextmanager
    def paused_at(self, step: int) -> Iterator[dict[int, psutil.Process]]:
        """Stop all ranks soon after this step, so that what happens to them does so in the middle of the run.

        They are found before: that takes as long as several steps.
        """
        ranks = self.wait_for_ranks()
        self.wait_for_step(step)
        for process in ranks.values():
            process.send_signal(signal.SIGSTOP)
        try:
            yield ranks
        finally:
            for process in ranks.values():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)


def submit(cluster: Cluster, output_dir: Path, *arguments: str, options: tuple[str, ...] = ()) -> Job:
    """Submit slurm/train.sbatch with one rank on each of two nodes; `options` are sbatch's."""
    number = cluster.run(
        "sbatch", "--parsable", *PLACE, *options, "slurm/train.sbatch", *arguments, f"output_dir={output_dir}"
    )
    return Job(cluster, number, output_dir)


def training_settings(shards: Path, start_model: Path) -> tuple[str, ...]:
    return (
        f"model.path={start_model}",
        f"data.shards={shards}",
        "plan=ignore",
        "deepspeed=zero3_tiny",
        "data.num_workers=1",
        f"train.max_steps={NUM_STEPS}",
        "train.epochs=10",
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "train.lr=1e-3",
        "train.eps=1e-6",
        "train.patience=null",
        "evaluate.before_training=false",
        "evaluate.every_epochs=10",
        "evaluate.max_samples=2",
        "evaluate.max_new_tokens=4",
        "checkpoint.every_steps=2",
        "tracking.mode=disabled",
    )


def assert_same_result(found: Path, expected: Path) -> None:
    """Compare the numbers of every step, and every byte of weights and moments at the end."""
    curves = [[{key: row[key] for key in COMPARED} for row in read_metrics(run, "train")] for run in (found, expected)]
    assert curves[0] == curves[1]
    assert [row["step"] for row in curves[0]] == list(range(1, NUM_STEPS + 1))
    last = [list_checkpoints(run / "checkpoints")[-1] for run in (found, expected)]
    assert last[0].name == last[1].name
    files = [sorted(path.relative_to(folder) for path in (folder / "ranks").iterdir()) for folder in last]
    assert files[0] == files[1] and len(files[0]) == 2
    for name in files[0]:
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), name
