"""Forked programs behave as programs that a shell starts, and nothing outlives the tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import REPOSITORY, free_port, run, run_program, started

pytestmark = pytest.mark.slow
SHOW = """
import json, os, sys, threading
print(json.dumps({"argv": sys.argv, "name": __name__, "cwd": os.getcwd(), "path": sys.path[0],
                  "environment": dict(os.environ), "leader": os.getsid(0) == os.getpid(),
                  "threads": threading.active_count(), "torch": "torch" in sys.modules}))
print("an error", file=sys.stderr)
"""
SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(100)\n"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return tmp_path / "program.py"


def wait_for_pids(ranks_logs: list[Path], timeout_s: float = 60) -> list[int]:
    deadline = time.monotonic() + timeout_s
    while not all(log.exists() and log.read_text().endswith("\n") for log in ranks_logs):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [int(log.read_text()) for log in ranks_logs]


def test_a_forked_program_sees_what_it_was_given(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program.write_text(SHOW)
    monkeypatch.setenv("ONLY_HERE", "1")
    for rank, text in enumerate(run([program, 1, "a b"], 2, tmp_path / "logs", cwd=tmp_path).split("---")[1:]):
        shown = json.loads(text.splitlines()[1])
        assert shown["argv"] == [str(program), "1", "a b"] and shown["name"] == "__main__"
        assert shown["cwd"] == shown["path"] == str(tmp_path)
        assert shown["environment"]["RANK"] == str(rank) and shown["environment"]["ONLY_HERE"] == "1"
        assert shown["leader"] and shown["torch"] and shown["threads"] == 1
    monkeypatch.delenv("ONLY_HERE")
    done = run_program([program], cwd=tmp_path)
    shown = json.loads(done.stdout)
    assert done.returncode == 0 and done.stderr == "an error\n"
    assert not {"RANK", "WORLD_SIZE", "ONLY_HERE"} & set(shown["environment"])


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("import sys; sys.exit(7)", 7),
        ("raise SystemExit('text')", 1),
        ("1 / 0", 1),
        ("import os; os.abort()", -signal.SIGABRT),
        ("import os; os._exit(3)", 3),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT); signal.pause()", -signal.SIGINT),
        ("import atexit; atexit.register(print, 'at exit')", 0),
    ],
)
def test_codes_are_those_of_a_new_interpreter(source: str, code: int, program: Path, tmp_path: Path) -> None:
    program.write_text(source + "\n")
    forked = run_program([program])
    fresh = subprocess.run(
        [sys.executable, program],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it for background jobs
    )
    assert (forked.returncode, fresh.returncode) == (code, code)
    assert forked.stdout == fresh.stdout and forked.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_modules_run_as_programs() -> None:
    done = run_program(["-m", "json.tool", "--help"])
    assert done.returncode == 0 and "usage: " in done.stdout


def test_signals_reach_ranks_and_the_rest_is_killed(program: Path, tmp_path: Path) -> None:
    program.write_text(SLEEP)
    with started([program], 2, tmp_path / "logs") as ranks:
        pids = wait_for_pids(ranks.logs)
        assert pids == [process.pid for process in ranks.processes]
        ranks.processes[0].send_signal(signal.SIGTERM)
        assert ranks.processes[0].wait(30) == -signal.SIGTERM
        assert ranks.processes[1].poll() is None
        with pytest.raises(TimeoutError, match=r"still running after 0\.2 s"):
            ranks.wait(0.2)
    assert [process.returncode for process in ranks.processes] == [-signal.SIGTERM, -signal.SIGKILL]


def test_nothing_outlives_a_session_that_is_killed(program: Path, tmp_path: Path) -> None:
    program.write_text(SLEEP)
    session = tmp_path / "session.py"
    session.write_text(
        "import sys, time\nfrom pathlib import Path\nfrom ranks import started\n"
        f"with started([{str(program)!r}], 2, Path({str(tmp_path)!r}, 'logs')):\n    time.sleep(100)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])}
    with subprocess.Popen([sys.executable, session], env=environment) as process:
        deadline = time.monotonic() + 120
        while len(logs := sorted((tmp_path / "logs").glob("*.log"))) < 2 or not all(log.read_text() for log in logs):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        pids = wait_for_pids(logs)
        process.kill()
    deadline = time.monotonic() + 30
    while any(Path("/proc", str(pid)).exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_no_port_is_given_twice() -> None:
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50 and all(1024 < port < 32768 for port in ports)
