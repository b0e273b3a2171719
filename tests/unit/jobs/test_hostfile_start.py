"""Starts on the nodes of a hostfile, over real pdsh; ssh is a stand-in that starts a clean shell, as sshd does."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.jobs import hostfile
from cogvlm_ft.jobs.hostfile import HostfileStart, environment_of_nodes, read_hostfile, run_on_nodes, starts_in
from cogvlm_ft.jobs.stop import ask_to_stop
from cogvlm_ft.launch.submit import main as submit
from cogvlm_ft.runtime.run_lock import this_process

REQUIRED = "COGVLM_REQUIRE_SLURM"
SSH = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
shift # the host
exec env -i HOME=/nowhere PATH=/usr/bin:/bin bash -c "$*"
"""
# In place of Python with DeepSpeed's launcher: records what it was given, and starts a rank that ends on USR1.
PYTHON = """#!/bin/bash
for word in "$@"; do case $word in --node_rank=*) node=${{word#*=}};; esac; done
pwd >{out}/folder-$node
env -0 >{out}/environment-$node
printf '%s\\0' "$@" >{out}/arguments-$node
bash -c 'trap "touch {out}/stopped-$0; exit 0" USR1; touch {out}/started-$0; while :; do sleep 0.05; done' $node &
wait; wait
exit 7
"""
ODD = 'a\'b $(touch pwned) `x` "y" $HOME %n %h ; (z)\nsecond line'


def write_program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what the nodes record; a stand-in of ssh comes first in PATH."""
    if shutil.which("pdsh") is None:
        (pytest.fail if os.environ.get(REQUIRED) else pytest.skip)("pdsh is not installed; `make slurm` installs it")
    (tmp_path / "bin").mkdir()
    (tmp_path / "out").mkdir()
    write_program(tmp_path / "bin/ssh", SSH)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    python = write_program(tmp_path / "bin/python", PYTHON.format(out=tmp_path / "out"))
    monkeypatch.setattr(hostfile.sys, "executable", str(python))
    return tmp_path / "out"


def start_of(output_dir: Path, *arguments: str) -> HostfileStart:
    return HostfileStart({"localhost": 2, "127.0.0.1": 2}, "localhost", 29500, output_dir, list(arguments))


@pytest.mark.parametrize("stopped_by", ["signal", "launch/stop.py"])
def test_environment_arguments_and_stop_reach_every_node(
    out: Path, monkeypatch: pytest.MonkeyPatch, stopped_by: str
) -> None:
    given = {"WANDB_API_KEY": "a-secret-key", "HF_HOME": "/hf", "OMP_NUM_THREADS": "3", "GLOO_SOCKET_IFNAME": "eth0"}
    given |= {"PYTORCH_ALLOC_CONF": "x:1", "COGVLM_OUTCOME_FILE": "/outcome", "SHARDS": "/shards", "ODD": ODD}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    output_dir = out / "run(1) it's %n $HOME"
    seen: dict[str, object] = {}

    def look_and_stop() -> None:
        wait_until(lambda: all((out / f"started-{node}").exists() for node in (0, 1)))
        (file,) = starts_in(output_dir)
        seen["mode"] = stat.S_IMODE(file.stat().st_mode)
        lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
        seen["shown"] = [line for line in lines if "a-secret-key" in line]
        if stopped_by == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            ask_to_stop(output_dir, this_process())

    watcher = threading.Thread(target=look_and_stop)
    watcher.start()
    code = run_on_nodes(
        start_of(output_dir, "--config", "demo", f"tracking.name={ODD}", "data.shards=${oc.env:SHARDS}")
    )
    watcher.join()
    assert code == 7, "of the launcher"
    assert seen == {"mode": 0o600, "shown": []}
    assert not list(output_dir.glob(".*")), "the file is deleted, for it holds keys"
    for node in (0, 1):
        environment = dict(
            line.partition("=")[::2] for line in (out / f"environment-{node}").read_text().split("\0") if line
        )
        assert given.items() <= environment.items()
        assert environment["HOME"] == "/nowhere", "a node's own"
        arguments = (out / f"arguments-{node}").read_text().split("\0")[:-1]
        assert arguments[-4:] == ["--config", "demo", f"tracking.name={ODD}", "data.shards=${oc.env:SHARDS}"]
        assert f"--node_rank={node}" in arguments
        assert (out / f"folder-{node}").read_text().strip() == str(Path.cwd())
        assert (out / f"stopped-{node}").exists()
    assert not (out / "pwned").exists() and not Path("pwned").exists()


def test_variables_of_a_login_session_stay_where_they_are(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\nnot a line\nB=2\n")
    session = dict.fromkeys(["HOME", "SSH_AUTH_SOCK", "RANK", "XDG_RUNTIME_DIR", "SHELLOPTS", "BASH_FUNC_x%%"], "1")
    found = environment_of_nodes({**session, "PATH": "/bin", "B": "1"}, [tmp_path / "none", tmp_path])
    assert found == {"PATH": "/bin", "NCCL_DEBUG": "INFO", "B": "2"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found no node"),
        ("node1", "line 1: found 'node1'"),
        ("node1 slots=8\nnode1 slots=8", "line 2: found a node that is listed twice"),
        ("node1 slots=0", "line 1"),
        ("node1;reboot slots=8", "line 1"),
        ("node1 slots=8\nnode2 slots=4", "different slots"),
    ],
)
def test_mistakes_in_a_hostfile(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "hostfile").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_hostfile(tmp_path / "hostfile")


def test_a_hostfile_with_comments(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("# two nodes\nnode1 slots=8  # first\n\nuser@10.0.0.2 slots=8\n")
    assert read_hostfile(tmp_path / "hostfile") == {"node1": 8, "user@10.0.0.2": 8}


def test_options_of_slurm_do_not_go_with_a_hostfile(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"model.path={tiny_folder}", "data.shards=s", "output_dir=o"]
    assert submit(["--hostfile", "h", "--nodes", "2", "--after", *settings]) == 2
    assert "--hostfile: found --nodes --after; expected none" in capsys.readouterr().err
