"""How the doctor runs checks and prints findings; the program around them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from examining import Examine
from ranks import OWN_NAMESPACE, REPOSITORY, fork_server, run_program

from cogvlm_ft.doctor.checks import CHECKS, CLOCKS, DISK, FOLDER, LEFTOVERS, RANKS, SHARING
from cogvlm_ft.doctor.examination import (
    Check,
    Examination,
    as_text,
    green,
    red,
)
from cogvlm_ft.launch.doctor import main


@pytest.mark.slow
def test_nothing_is_red_where_all_is_well_and_nothing_is_left(run_checks: Examine, tmp_path: Path) -> None:
    num_red, said = run_checks(list(CHECKS))
    assert num_red == 0 and "red " not in said
    for check in CHECKS:
        assert f"{check.title}: " in said or check in (CLOCKS, SHARING, FOLDER), check.title
    assert "63 tensors with the expected names and shapes, 400 pieces, 56 px" in said
    assert "train: 33 samples, 33 at random read and decoded" in said and "val: 9 samples" in said
    assert not (tmp_path / "run").exists()


def test_what_was_there_stays(run_checks: Examine, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / ".tmp-step-00000003").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "damaged-step-00000002").mkdir()
    num_red, said = run_checks([FOLDER, SHARING, DISK, LEFTOVERS])
    assert num_red == 0 and "yellow  leftovers" in said
    assert ".tmp-step-00000003" in said and "damaged-step-00000002" in said
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == [
        ".tmp-step-00000003",
        "checkpoints",
        "damaged-step-00000002",
    ]


def test_a_check_that_crashes_is_a_red_line_and_the_others_run(run_checks: Examine) -> None:
    def crash(_: Examination) -> None:
        raise ZeroDivisionError("the disk of node7 turned into smoke")

    looks, judges = Check("first", crash, lambda _, seen: []), Check("second", lambda _: 1, lambda _, seen: 1 // 0)  # type: ignore[arg-type, return-value]
    num_red, said = run_checks([looks, judges, RANKS])
    assert num_red == 2
    assert "red     first: rank 0 on " in said and "ZeroDivisionError: the disk of node7 turned into smoke" in said
    assert "red     second: " in said and "green   ranks: 1 on 1 host: " in said and "Traceback" not in said


def test_no_check_runs_after_a_vital_one_that_is_red(run_checks: Examine) -> None:
    broken = Check("broken", lambda _: None, lambda _, seen: [red("a", "b", "c")], is_vital=True)
    assert run_checks([broken, RANKS]) == (1, "red     broken: a\n        expected: b\n        do: c\n")


def test_colours() -> None:
    assert as_text("disk", green("fast"), coloured=True) == "\033[32mgreen   \033[0mdisk: fast"


def test_settings_that_are_wrong(capsys: pytest.CaptureFixture) -> None:
    assert main(["model.pth=x"]) == 2
    assert "ConfigError: " in capsys.readouterr().err
    assert main([]) == 2
    assert "no value for data.shards" in capsys.readouterr().err


@pytest.mark.slow
def test_the_program_on_a_disk_that_is_really_full(start_model: Path, shards: Path, tmp_path: Path) -> None:
    """One red line, exit code 1, no traceback, no colours in a file."""
    if subprocess.run(["unshare", "--map-root-user", "--mount", "true"], check=False).returncode != 0:
        pytest.skip("no user namespaces here")
    (tmp_path / "full").mkdir()
    settings = [f"model.path={start_model}", f"data.shards={shards}", f"output_dir={tmp_path}/full/run"]
    settings += ["deepspeed=configs/deepspeed/zero3_tiny.json", "tracking.mode=offline"]
    fill = f"mount -t tmpfs -o size=9m none {tmp_path}/full; head -c 6M /dev/zero > {tmp_path}/full/photos"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    done = run_program([OWN_NAMESPACE, fill, "true", "launch/doctor.py", *settings], environment=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "red     disk: writing 8 MiB on " in done.stdout and "No space left on device" in done.stdout
    assert done.stdout.endswith("1 red\n") and "\033" not in done.stdout and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_signal_leaves_nothing_behind(start_model: Path, shards: Path, tmp_path: Path) -> None:
    settings = [f"model.path={start_model}", f"data.shards={shards}", f"output_dir={tmp_path}/run"]
    settings += ["deepspeed=configs/deepspeed/zero3_tiny.json", "tracking.mode=disabled"]
    log = tmp_path / "log"
    process = fork_server().start(["launch/doctor.py", *settings], os.environ, REPOSITORY, log, log)
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "run").glob(f".tmp-doctor-*-{process.pid}")):  # while it measures the disk
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert not (tmp_path / "run").exists()
