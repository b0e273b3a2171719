"""The virtual cluster: hosts of their own, and nothing left behind when the tests are killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.xdist_group("slurm")]

START_AND_SLEEP = """
import sys, time
from pathlib import Path
from cluster import started_cluster
with started_cluster(Path(sys.argv[1])):
    print("up", flush=True)
    time.sleep(600)
"""


def test_every_node_is_a_host_of_its_own(cluster: Cluster) -> None:
    """Check that address, shared memory and processes of a node are invisible to the others and to this machine."""
    look = "echo $(hostname) $(ip -brief address show eth0) $(ls /dev/shm; touch /dev/shm/here) $(pgrep -c slurmd)"
    for _ in range(2):
        printed = cluster.run(
            "srun", "--nodelist=node[1-2]", "--nodes=2", "--ntasks-per-node=1", "--gres=gpu:2", "bash", "-c", look
        )
    for number, line in enumerate(sorted(printed.splitlines()), 1):
        assert line.startswith(f"node{number} eth0") and f" 10.99.1.{number}/16 " in line, printed
        assert line.endswith(" here 1"), printed
    assert not Path("/dev/shm/here").exists()


def test_it_ends_with_the_process_that_started_it(cluster: Cluster, tmp_path: Path) -> None:
    """Start a second cluster beside the first one, with the same addresses."""
    command = [sys.executable, "-c", START_AND_SLEEP, str(tmp_path / "second")]
    starter = subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None and starter.stdout.readline() == "up\n"
    started = psutil.Process(starter.pid).children(recursive=True)
    names = [process.name() for process in started]
    assert names.count("slurmctld") == 1 and names.count("slurmd") == 2
    starter.kill()
    starter.wait()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive
    assert cluster.nodes("idle") == ["node1", "node2", "node3", "node4"]
