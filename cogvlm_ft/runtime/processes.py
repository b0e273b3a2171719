"""Processes of this machine by number and start. The start counts from boot, so that no step of the clock changes it.

psutil's `create_time`, and before 7.1 its `is_running` too, move with the clock: a machine whose clock is set would
take its running processes for others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ENDED = b"ZX"


@dataclass(frozen=True)
class Process:
    """A process. started_s: seconds after boot."""

    pid: int
    started_s: float
    parent: int

    @property
    def is_running(self) -> bool:
        found = find_process(self.pid)
        return found is not None and found.started_s == self.started_s


def find_process(pid: int) -> Process | None:
    """Return the process that has this number now; None if none has, or if it has ended and waits for its parent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()  # its name may hold anything
    except OSError:
        return None
    state, parent, start_ticks = fields[0], int(fields[1]), int(fields[19])
    return None if state in ENDED else Process(pid, start_ticks / os.sysconf("SC_CLK_TCK"), parent)


def parents_of(pid: int) -> Iterator[Process]:
    """Yield the ancestors of a process, its parent first."""
    process = find_process(pid)
    while process is not None and process.parent:
        process = find_process(process.parent)
        if process is not None:
            yield process


def words_of(process: Process) -> list[str]:
    """Return the command line; nothing if it may not be read."""
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []
