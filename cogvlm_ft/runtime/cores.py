"""Which node a rank is on, and how many of its cores are this rank's."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import psutil

THREADS_VARIABLE = "OMP_NUM_THREADS"
NODE_NUMBERS = ("SLURM_NODEID", "GROUP_RANK", "CROSS_RANK")
"""Environment variables in which srun, torchrun and deepspeed state the number of the node."""


def node_id() -> str:
    """Return what tells this node from others: containers on several machines may have one host name.

    The boot of the machine, the host name (of a container), and the numbers that launchers give to nodes.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    machine = boot.read_text(encoding="utf-8").strip() if boot.exists() else ""
    return "/".join([machine, socket.gethostname(), *(os.environ.get(name, "") for name in NODE_NUMBERS)])


def threads_of(node: str, cores: Sequence[int], ranks: Sequence[tuple[str, Sequence[int]]]) -> int:
    """Return the number of cores of one rank. ranks: node and cores of all; Slurm may bind each to cores of its own."""
    sharing = sum(other == node and not set(cores).isdisjoint(theirs) for other, theirs in ranks)
    return max(1, len(cores) // max(1, sharing))


def is_set_by_launcher() -> bool:
    """Return whether torchrun, which started this process, was not given OMP_NUM_THREADS but set it."""
    with contextlib.suppress(psutil.Error, OSError):
        return "TORCHELASTIC_RUN_ID" in os.environ and THREADS_VARIABLE not in psutil.Process(os.getppid()).environ()
    return False
