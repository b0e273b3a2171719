"""A rank that waits in vain reports where and ends; slow ranks are not ended."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from ranks import Ranks, started

from cogvlm_ft.runtime.watchdog import TICK_S

pytestmark = [pytest.mark.slow, pytest.mark.serial]
PROGRAM = Path(__file__).with_name("hanging.py")
TIMEOUT_S = 4.0


def wait_for_line(ranks: Ranks, line: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while any(line not in log.read_text() for log in ranks.logs):
        assert time.monotonic() < deadline, ranks.output()
        time.sleep(0.05)


def test_a_rank_that_waits_for_a_stopped_one_ends_with_its_stacks(tmp_path: Path) -> None:
    with started([PROGRAM, tmp_path / "run", TIMEOUT_S, 100000, 0.05], 2, tmp_path / "logs") as ranks:
        wait_for_line(ranks, "step 3 done")
        ranks.processes[1].send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        assert ranks.processes[0].wait(TIMEOUT_S + 20) == 1
        assert TIMEOUT_S - 1 < time.monotonic() - begun < TIMEOUT_S + 5
        stacks = (tmp_path / "run" / "stacks" / "rank-00000.txt").read_text()
        for text in (stacks, ranks.logs[0].read_text()):
            assert f"made no progress for {TIMEOUT_S:g} s (train.hang_timeout_s) and ends" in text
            assert "all_reduce" in text and "hanging.py" in text and "Current thread" in text
        ranks.processes[1].send_signal(signal.SIGCONT)
        begun = time.monotonic()
        assert ranks.processes[1].wait(30) != 0  # the other one is gone
        # gloo reports the lost connection or, about once in six times, waits on: then the watchdog ends this rank too,
        # but the time for which it was stopped counts as two ticks of it.
        if (tmp_path / "run" / "stacks" / "rank-00001.txt").exists():
            assert time.monotonic() - begun > TIMEOUT_S - 2 * TICK_S - 0.5


def test_slow_steps_a_rank_that_works_alone_and_a_suspended_job_are_not_a_hang(tmp_path: Path) -> None:
    """Each takes several times the timeout. Nothing is left of the watchdog."""
    with started([PROGRAM, tmp_path / "run", 1.5, 5, 0.8, "alone"], 2, tmp_path / "logs") as ranks:
        wait_for_line(ranks, "step 1 done")
        ranks.send(signal.SIGSTOP)  # as scontrol suspend
        time.sleep(5)
        ranks.send(signal.SIGCONT)
        assert ranks.wait(60) == [0, 0], ranks.output()
        assert ranks.output().count("end") == 2
    assert list((tmp_path / "run").iterdir()) == []


def test_code_that_keeps_the_interpreter_is_ended_from_c(tmp_path: Path) -> None:
    with started([PROGRAM, tmp_path / "run", 1.5, 2, 0.1, "gil"], 1, tmp_path / "logs") as ranks:
        wait_for_line(ranks, "step 1 done")
        begun = time.monotonic()
        assert ranks.processes[0].wait(30) == -signal.SIGABRT
        assert time.monotonic() - begun < 8
        assert "Python could not run for 3 s (2 x train.hang_timeout_s)" in ranks.output()
        stacks = (tmp_path / "run" / "stacks" / "rank-00000.txt").read_text()
        assert "Fatal Python error: Aborted" in stacks and "hanging.py" in stacks
