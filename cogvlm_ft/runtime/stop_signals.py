"""Requests to stop: SIGTERM, SIGUSR1, or the end of the launcher; all ranks answer together, between steps or batches.

A launcher that ends, or is killed, may leave its ranks running: `deepspeed` does after SIGTERM. Such ranks save and end
instead of holding the GPUs and the port of the next run.
"""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from types import FrameType, TracebackType

import psutil

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LAUNCHERS = {"deepspeed", "torchrun", "accelerate", "mpirun", "mpiexec", "orterun"}
LAUNCHER_MODULES = {"deepspeed.launcher.runner", "deepspeed.launcher.launch", "torch.distributed.run"}


class StopRequested(Exception):
    """A rank was asked to stop; raised on all of them."""


class StopRequest:
    """Context manager; `seen` becomes true on this rank when a stop signal arrives or a launcher of it ends."""

    def __init__(self) -> None:
        self._was_signalled = False
        self._launchers = find_launchers()
        self._former: dict[signal.Signals, object] = {}

    @property
    def seen(self) -> bool:
        return self._was_signalled or not all(_is_running(launcher) for launcher in self._launchers)

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def check(self) -> None:
        """Raise StopRequested on every rank if any rank was asked to stop. Collective."""
        from cogvlm_ft.runtime.distributed import any_rank  # late: torch takes seconds, and signals are caught at once

        if any_rank(self.seen):
            raise StopRequested

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._was_signalled = True


def ignore_stop_signals(_worker: int = 0) -> None:
    """Leave stop signals to the rank, in a process that it has started: they reach the whole process group."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def find_launchers() -> list[psutil.Process]:
    """Return the programs among the ancestors of this process that start ranks."""
    with contextlib.suppress(psutil.Error):
        return [process for process in psutil.Process().parents() if _is_launcher(process)]
    return []


def _is_launcher(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()[:4]  # python -u -m deepspeed.launcher.launch
    except psutil.Error:
        return False
    return any(Path(word).name in LAUNCHERS or word in LAUNCHER_MODULES for word in words)


def _is_running(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
