"""deepspeed with a hostfile, without Slurm and without ssh, over two hosts: the commands of docs/slurm.md."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import REPOSITORY, TIMEOUT_S, read_metrics
from tiny import short_run_settings

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
REQUIRED = "COGVLM_REQUIRE_SLURM"
PROGRAMS = ("unshare", "setpriv", "ip", "nsenter")
# Killed together with whoever started it; and all of its processes with it.
NAMESPACES = "setpriv --pdeathsig KILL unshare --net --mount --uts --pid --fork --kill-child --mount-proc"

# $1: folder with hosts and run.sh. Two hosts on a bridge, each with its own name, address, loopback and /dev/shm.
HOSTS = r"""
set -e
export folder=$1
ip link add name bridge0 type bridge
ip link set bridge0 up
mount --bind "$folder/hosts" /etc/hosts
mount --bind "$folder/nsswitch.conf" /etc/nsswitch.conf
host() {
    hostname "host$1"
    ip link set lo up
    ip link add eth0 type veth peer name "cable$1" netns 1
    ip addr add "10.98.0.1$1/24" dev eth0
    ip link set eth0 up
    nsenter --net=/proc/1/ns/net ip link set "cable$1" master bridge0 up
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    exec bash "$folder/run.sh" "$1" >"$folder/host$1.log" 2>&1
}
export -f host
for number in 0 1; do
    unshare --net --mount --uts bash -ec "host $number" &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
"""


def require_namespaces() -> None:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    problem = f"{', '.join(missing)} not installed" if missing else "namespaces need root" if os.geteuid() else ""
    if problem and os.environ.get(REQUIRED):
        pytest.fail(f"{REQUIRED} is set, and {problem}; `make slurm` installs what is missing")
    if problem:
        pytest.skip(f"{problem}; `make slurm` installs what is missing")


def test_two_hosts(shards: Path, start_model: Path, tmp_path: Path) -> None:
    require_namespaces()
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n10.98.0.10 host0\n10.98.0.11 host1\n")
    (tmp_path / "nsswitch.conf").write_text("passwd: files\nhosts: files\n")
    (tmp_path / "hostfile").write_text("host0 slots=1\nhost1 slots=1\n")
    settings = short_run_settings(shards, start_model, tmp_path / "run")
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--no_ssh", "--hostfile", str(tmp_path / "hostfile")]
    program = ["--master_addr", "host0", "--master_port", "29500", "launch/train.py", *settings]
    (tmp_path / "run.sh").write_text(f"exec {shlex.join(launcher)} --node_rank $1 {shlex.join(program)}\n")
    (tmp_path / "hosts.sh").write_text(HOSTS)
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run(
        [*NAMESPACES.split(), "bash", str(tmp_path / "hosts.sh"), str(tmp_path)],
        cwd=REPOSITORY,
        env={**environment, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    logs = [path.read_text(errors="replace") for path in sorted(tmp_path.glob("host*.log"))]
    assert done.returncode == 0, "\n".join([done.stderr, *logs])
    assert [row["step"] for row in read_metrics(tmp_path / "run", "train")] == [1, 2]
    assert len(logs) == 2 and "'host0': [0], 'host1': [0]" in logs[0].replace("defaultdict", ""), logs[0]
