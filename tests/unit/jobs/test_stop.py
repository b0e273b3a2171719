"""launch/stop.py reaches the run through its lock, in the way that suits how it was started."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
from checkpoint_files import write_checkpoint

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.jobs.stop import ask_to_stop, find_owner, wait_for_end
from cogvlm_ft.launch.stop import main
from cogvlm_ft.runtime.outcome import OUTCOME_VARIABLE
from cogvlm_ft.runtime.run_lock import Owner, job_to_signal, run_lock, this_process
from cogvlm_ft.runtime.stop_signals import StopRequest


def test_a_run_on_this_machine(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The signal is acknowledged at once, and once."""
    with StopRequest() as request:
        with run_lock(tmp_path):
            owner = find_owner(tmp_path)
            assert ask_to_stop(tmp_path, owner) == f"kill -s USR1 {os.getpid()}"
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.seen
        assert capfd.readouterr().err == "rank 0: SIGUSR1: all ranks save after the current step and end\n"
    assert wait_for_end(tmp_path, owner) == "ended before its first checkpoint"
    saved = write_checkpoint(tmp_path / "checkpoints", 3)
    assert wait_for_end(tmp_path, owner) == f"ended; the newest checkpoint is {saved}"


@pytest.mark.parametrize("state", ["none", "released", "dead", "no lock"])
def test_nothing_to_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str], state: str) -> None:
    if state != "none":
        text = json.dumps({**dataclasses.asdict(this_process()), "started": 1.0, "is_released": state == "released"})
        (tmp_path / ".lock-000001").write_text(text if state != "no lock" else "x")
    assert main([str(tmp_path)]) == 2
    assert f"{tmp_path}: no training runs there; expected the output_dir of a running one" in capsys.readouterr().err


def owner_elsewhere(**changes: object) -> Owner:
    return dataclasses.replace(this_process(), machine="another", host="node9", pid=77, **changes)  # type: ignore[arg-type]


def test_a_run_on_another_host(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"process 77 on node9, .*Run there: kill -s USR1 77$"):
        ask_to_stop(tmp_path, owner_elsewhere())


def test_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its script is asked: if the ranks alone stopped, it would queue the job again."""
    scancel = tmp_path / "scancel"
    scancel.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/asked\n')
    scancel.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert ask_to_stop(tmp_path, owner_elsewhere(batch="12_3")) == "scancel --batch --signal=TERM 12_3"
    assert (tmp_path / "asked").read_text() == "--batch --signal=TERM 12_3\n"
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"Run where Slurm is: scancel --batch --signal=TERM 12$"):
        ask_to_stop(tmp_path, owner_elsewhere(batch="12"))


def test_the_name_of_a_job() -> None:
    """The number of an array's first task is that of the whole array."""
    batch = {"SLURM_JOB_ID": "40", OUTCOME_VARIABLE: "file"}
    assert job_to_signal(batch) == "40"
    assert job_to_signal({**batch, "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "2"}) == "40_2"
    assert job_to_signal({"SLURM_JOB_ID": "40"}) is None, "without a script that waits, as in salloc"
