"""A real Slurm cluster in namespaces of this machine: slurmctld, and nodes that are hosts of their own.

Every node has its own hostname, IP, loopback, PIDs and /dev/shm, four fake GPUs and a slurmd. One process holds
all of it and lives only as long as the pipe to its stdin is open: it cannot outlive the tests, however these end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = ("cogvlm_ft", "configs", "launch", "slurm")  # what jobs are submitted with
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "scancel", "unshare", "nsenter", "ip")
UNSHARE = "unshare --net --mount --uts --pid --fork --kill-child --mount-proc"
NODE_SECONDS = 90.0
DEVICES = ("zero", "full", "null", "random")  # fake GPUs: device files that no job uses

Found = TypeVar("Found")

SLURM_CONF = """\
ClusterName=virtual
SlurmctldHost=login(10.99.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits; 5 is the least.
AuthInfo=cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
JobRequeue=1
ReturnToService=2
SlurmdTimeout=15
MessageTimeout=10
KillWait=5
MinJobAge=3600
StateSaveLocation=/run/slurm/state
SlurmdSpoolDir=/run/slurm/spool-%n
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=node[1-{num_nodes}] CPUs=8 RealMemory=8000 Gres=gpu:4
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""

# PID 1 of the cluster. /run is its own, so that several clusters can use the same paths; commands come in by stdin.
LOGIN = r"""
set -e
folder=$1
hostname login
ip link set lo up
ip link add name bridge0 type bridge
ip addr add 10.99.0.1/16 dev bridge0
ip link set bridge0 up
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/munge /run/slurm
mount --bind "$folder/hosts" /etc/hosts
mount --bind "$folder/nsswitch.conf" /etc/nsswitch.conf
head -c 128 /dev/urandom >/run/munge/key
chmod 600 /run/munge/key
munged --key-file=/run/munge/key --pid-file=/run/munge/pid --log-file=/run/munge/log --seed-file=/run/munge/seed
export SLURM_CONF=$folder/slurm.conf
slurmctld -c
touch "$folder/up"
while read -r verb node number; do
    case $verb in
    on)
        setsid bash "$folder/node.sh" "$folder" "$node" "$number" </dev/null >>"$folder/$node.log" 2>&1 &
        eval "$node=$!"
        ;;
    off) kill -s KILL "${!node}" && wait "${!node}" || true ;;
    esac
done
"""

# A node: a cable to the bridge first, as long as PID 1 is still the cluster's; then processes of its own.
NODE = r"""
set -e
folder=$1 node=$2 number=$3
cable() {
    hostname "$node"
    ip link set lo up
    ip link add eth0 type veth peer name "cable$number" netns 1
    ip addr add "10.99.1.$number/16" dev eth0
    ip link set eth0 up
    nsenter --net=/proc/1/ns/net ip link set "cable$number" master bridge0 up
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    exec unshare --pid --fork --kill-child --mount-proc bash -c \
        'export SLURM_CONF=$1/slurm.conf; slurmd -D -N "$2" & wait' node "$folder" "$node"
}
export -f cable
export folder node number
exec unshare --net --mount --uts bash -ec cable
"""


def why_impossible() -> str:
    """Return why no cluster can be started here; an empty text if one can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if os.geteuid() != 0:
        return "namespaces need root"
    trial = subprocess.run(
        [*UNSHARE.split(), "ip", "link", "add", "name", "bridge0", "type", "bridge"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return f"no namespaces with a network here: {trial.stderr.strip()}" if trial.returncode else ""


class Cluster:
    """`folder` takes configuration, logs, and the checkout that jobs are submitted from; nodes are node1, node2, ..."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder = folder
        self.checkout = folder / "checkout"  # links: a real one would be filled with the jobs' logs
        self.checkout.mkdir(parents=True)
        for name in SHIPPED:
            (self.checkout / name).symlink_to(REPOSITORY / name)
        names = [f"node{number}" for number in range(1, num_nodes + 1)]
        hosts = ["127.0.0.1 localhost", "10.99.0.1 login", *(f"10.99.1.{i} {name}" for i, name in enumerate(names, 1))]
        self._write("hosts", "\n".join(hosts) + "\n")
        # No DNS server can be reached: whoever asked for an address that hosts lacks would wait.
        self._write("nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n")
        self._write("slurm.conf", SLURM_CONF.format(folder=folder, num_nodes=num_nodes))
        gpus = [f"NodeName=node[1-{num_nodes}] Name=gpu File=/dev/{name}\n" for name in DEVICES]
        self._write("gres.conf", "".join(gpus))
        self._write("node.sh", NODE)
        self._write("login.sh", LOGIN)
        with (folder / "login.log").open("w") as log:
            self._holder = subprocess.Popen(
                [*UNSHARE.split(), "bash", str(folder / "login.sh"), str(folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        try:
            self.wait_until(lambda: (folder / "up").exists(), "slurmctld is up", NODE_SECONDS)
            for name in names:
                self.power_on(name)
            self.wait_until(lambda: self.nodes("idle") == names, "all nodes are idle", NODE_SECONDS)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()

    def run(self, *command: object, check: bool = True, timeout_s: float = 60) -> str:
        """Run `command` on the login node, in the checkout, and return its output."""
        done = subprocess.run(
            self.command(*command), capture_output=True, text=True, timeout=timeout_s, check=False, env=environment()
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return (done.stdout + done.stderr).strip()

    def command(self, *command: object) -> list[str]:
        """Return `command` as it has to be called from outside."""
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        enter = ["nsenter", f"--target={children[0]}", "--net", "--mount", "--uts", "--pid"]
        return [
            *enter,
            "env",
            f"--chdir={self.checkout}",
            f"SLURM_CONF={self.folder / 'slurm.conf'}",
            *map(str, command),
        ]

    def power_on(self, node: str) -> None:
        self._tell(f"on {node} {node.removeprefix('node')}")

    def power_off(self, node: str) -> None:
        """End everything on it at once, without notice to the others."""
        self._tell(f"off {node}")

    def nodes(self, state: str) -> list[str]:
        """Return the names of the nodes in this state."""
        listed = self.run("sinfo", "--noheader", "--Node", f"--states={state}", "--format=%N", check=False)
        return sorted(set(listed.split()))  # once for every partition

    def job(self, number: str) -> dict[str, str]:
        """Return what scontrol reports about a job: JobState, ExitCode, Restarts, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_until(self, is_true: Callable[[], Found], what: str, timeout_s: float = 120, poll_s: float = 0.5) -> Found:
        """Wait until `is_true` returns something true, and return that. Calls of Slurm programs take CPU time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = is_true()
            if found:
                return found
            if self._holder.poll() is not None:
                break
            time.sleep(poll_s)
        raise TimeoutError(f"{what}: not within {timeout_s:.0f} s\n{self.logs()}")

    def logs(self) -> str:
        """Return the ends of the daemons' logs."""
        parts = []
        for path in sorted([*self.folder.glob("*.log"), *self.checkout.glob("*.log")]):
            parts.append(f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-25:]))
        return "\n".join(parts)

    def _tell(self, line: str) -> None:
        assert self._holder.stdin is not None
        self._holder.stdin.write(line + "\n")
        self._holder.stdin.flush()

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")


def environment() -> dict[str, str]:
    """Return the environment without what a launcher or another job may have left."""
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in hidden and not key.startswith("SLURM_")}
    return {**kept, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHON": sys.executable}


@contextlib.contextmanager
def started_cluster(folder: Path, num_nodes: int = 2) -> Iterator[Cluster]:
    cluster = Cluster(folder, num_nodes)
    try:
        yield cluster
    finally:
        cluster.close()
