"""Runs a real program on real ranks: one process each, gloo on this machine, hard timeout, nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_S = 240


@dataclass(frozen=True)
class Ranks:
    """Running processes of one job and the files that take their output."""

    processes: list[subprocess.Popen]
    logs: list[Path]

    def wait(self, timeout_s: float = TIMEOUT_S) -> list[int]:
        """Exit codes in rank order; TimeoutError with every log if they take too long."""
        deadline = time.monotonic() + timeout_s
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"ranks still running after {timeout_s} s\n{self.output()}") from None

    def output(self) -> str:
        return "\n".join(f"--- rank {i}\n{log.read_text(errors='replace')}" for i, log in enumerate(self.logs))

    def send(self, number: signal.Signals) -> None:
        for process in self.processes:
            process.send_signal(number)

    def kill(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def started(arguments: Sequence[object], world_size: int, logs: Path) -> Iterator[Ranks]:
    """The python program `arguments` on `world_size` ranks, one thread each; killed at the end if still running."""
    logs.mkdir(parents=True, exist_ok=True)
    port, processes, files = free_port(), [], []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "disabled",
        }
        files.append(logs / f"rank-{rank}-{time.monotonic_ns()}.log")
        with files[-1].open("w") as log:
            command = [sys.executable, *map(str, arguments)]
            processes.append(
                subprocess.Popen(
                    command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            )
    ranks = Ranks(processes, files)
    try:
        yield ranks
    finally:
        ranks.kill()


def run(arguments: Sequence[object], world_size: int, logs: Path, timeout_s: float = TIMEOUT_S) -> str:
    """Run to the end and return the output; every rank must exit 0."""
    with started(arguments, world_size, logs) as ranks:
        codes = ranks.wait(timeout_s)
        assert codes == [0] * world_size, f"exit codes {codes}\n{ranks.output()}"
        return ranks.output()


def read_metrics(run: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["kind"] == kind]


def wait_for_step(run: Path, step: int, ranks: Ranks, timeout_s: float = 120) -> None:
    """Until the run has logged that step."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists():
            rows = read_metrics(run, "train")
            if rows and rows[-1]["step"] >= step:
                return
        time.sleep(0.02)
    raise TimeoutError(f"step {step} was not reached\n{ranks.output()}")
