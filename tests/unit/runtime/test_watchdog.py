"""The watchdog's cost and how it ends a process."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from cogvlm_ft.runtime.watchdog import progress, watched


def watchdogs() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_it_ends_with_the_block_however_that_ends(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), watched(tmp_path, 3, 1.0):
        assert len(watchdogs()) == 1
        raise ValueError("mine")
    assert not watchdogs()
    assert list(tmp_path.iterdir()) == []
    time.sleep(1.2)  # would end the tests


def test_without_a_timeout_there_is_none(tmp_path: Path) -> None:
    with watched(tmp_path, 0, None):
        assert not watchdogs()
    assert list(tmp_path.iterdir()) == []


def test_stacks_of_an_attempt_before_stay(tmp_path: Path) -> None:
    path = tmp_path / "stacks" / "rank-00000.txt"
    path.parent.mkdir()
    path.write_text("before\n")
    with watched(tmp_path, 0, 100.0):
        pass
    assert path.read_text() == "before\n"


def test_marking_progress_costs_next_to_nothing() -> None:
    start = time.thread_time()
    for _ in range(10_000):
        progress()
    assert (time.thread_time() - start) / 10_000 < 20e-6
