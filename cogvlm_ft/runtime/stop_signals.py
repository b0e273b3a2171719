"""Requests to stop: a signal, or the end of the launcher; all ranks answer together, between steps or batches.

The signals are those of batch systems before they end a job (SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU), and of a terminal
that is closed (SIGHUP, unless nohup ignores it).
A launcher that ends, or is killed, may leave its ranks running: `deepspeed` does after SIGTERM. Such ranks save and end
instead of holding the GPUs and the port of the next run.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import ClassVar

from cogvlm_ft.runtime.processes import Process, parents_of, words_of

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP)
LAUNCHERS = {"deepspeed", "torchrun", "accelerate", "mpirun", "mpiexec", "orterun"}
LAUNCHER_MODULES = {"deepspeed.launcher.runner", "deepspeed.launcher.launch", "torch.distributed.run"}


class StopRequested(Exception):
    """A rank was asked to stop; raised on all of them."""


class StopRequest:
    """Context manager; `seen` becomes true on this rank when a stop signal arrives or a launcher of it ends.

    An error of this rank alone asks all ranks to stop too: they save, and then all of them raise it.
    """

    _active: ClassVar[StopRequest | None] = None

    def __init__(self) -> None:
        self._was_signalled = False
        self._error: Exception | None = None
        self._launchers = find_launchers()
        self._former: dict[signal.Signals, object] = {}

    @property
    def seen(self) -> bool:
        return self._error is not None or self.is_from_outside

    @property
    def is_from_outside(self) -> bool:
        """Whether a signal arrived or a launcher ended, instead of an error on this rank."""
        return self._was_signalled or not all(launcher.is_running for launcher in self._launchers)

    def fail(self, error: Exception) -> None:
        """Ask all ranks to stop because of an error on this one."""
        self._error = self._error or error

    @contextlib.contextmanager
    def failing(self, *kinds: type[Exception]) -> Iterator[None]:
        """Turn errors of these kinds in the block into a request to stop."""
        try:
            yield
        except kinds as error:
            self.fail(error)

    def raise_error(self) -> None:
        """Raise on every rank the first error of any of them, unless a stop was requested from outside. Collective."""
        from cogvlm_ft.runtime.distributed import any_ranks, from_main, gather_to_main

        failed, is_from_outside = any_ranks([self._error is not None, self.is_from_outside])
        if failed and not is_from_outside:
            errors = gather_to_main(self._error) or []
            error = from_main(next((each for each in errors if each is not None), None))
            raise error

    def __enter__(self) -> StopRequest:
        StopRequest._active = self
        for number in STOP_SIGNALS:
            if not is_ignored(number):
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        StopRequest._active = None
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def check(self) -> None:
        """Raise StopRequested on every rank if any rank was asked to stop. Collective."""
        from cogvlm_ft.runtime.distributed import any_rank  # late: torch takes seconds, and signals are caught at once

        if any_rank(self.seen):
            raise StopRequested

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if not self._was_signalled:
            rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
            line = f"rank {rank}: {signal.Signals(number).name}: all ranks save after the current step and end\n"
            os.write(2, line.encode())  # not by logging, which the signal may have interrupted
        self._was_signalled = True


@contextlib.contextmanager
def stopping_together(stop_request: StopRequest | None, *kinds: type[Exception]) -> Iterator[None]:
    """Raise StopRequested on every rank after the block if any was asked to stop, or an error of these kinds ended it.

    Collective, but nothing in the block is. With a stop_request of None every rank raises the error itself.
    """
    if stop_request is None:
        from cogvlm_ft.runtime.distributed import shared_errors

        with shared_errors():
            yield
        return
    with stop_request.failing(*kinds):
        yield
    stop_request.check()


def is_stop_requested() -> bool:
    """Return whether this process was asked from outside to stop, as a rank in a `StopRequest`."""
    active = StopRequest._active
    return active is not None and active.is_from_outside


def is_ignored(number: signal.Signals) -> bool:
    """Return whether nohup has this process outlive its terminal."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


@contextlib.contextmanager
def kept_from_new_processes() -> Iterator[None]:
    """Let no stop signal reach the processes that the block starts, not even while they start: they are the rank's."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # which they inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def ignore_stop_signals(_worker: int = 0) -> None:
    """Leave stop signals to the rank, in a process that it has started: they reach the whole process group."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def find_launchers() -> list[Process]:
    """Return the programs among the ancestors of this process that start ranks."""
    return [process for process in parents_of(os.getpid()) if _is_launcher(words_of(process))]


def _is_launcher(words: list[str]) -> bool:
    return any(Path(word).name in LAUNCHERS or word in LAUNCHER_MODULES for word in words[:4])  # python -u -m MODULE
