"""Which signals ask a rank to stop."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from ranks import run_program

from cogvlm_ft.runtime.stop_signals import STOP_SIGNALS, StopRequest, ignore_stop_signals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signals_of_batch_systems_and_of_a_closed_terminal_ask_to_stop(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    former = signal.signal(number, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with StopRequest() as request:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            assert request.seen and request.is_from_outside
    finally:
        signal.signal(number, former)
    assert capfd.readouterr().err.count(f"{number.name}: all ranks save") == 1


def test_nohup_outlives_its_terminal() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.seen
    finally:
        signal.signal(signal.SIGHUP, former)


def test_loader_processes_leave_them_to_their_rank() -> None:
    former = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        ignore_stop_signals()
        assert {signal.getsignal(number) for number in STOP_SIGNALS} == {signal.SIG_IGN}
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def test_a_signal_after_the_end_is_no_failure(tmp_path: Path) -> None:
    """The program has done its work and exits, which takes seconds where much memory is freed."""
    program = tmp_path / "signalled_at_exit.py"
    program.write_text(
        "import atexit, os, runpy, signal, sys\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM)\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = run_program([program, "launch/train.py", "no.setting=1"])
    assert done.returncode == 2, done.stderr
