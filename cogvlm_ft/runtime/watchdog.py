"""End a rank that makes no progress and write its stacks, so that its job ends instead of hanging.

A thread checks every second for calls of `progress()`. After `train.hang_timeout_s` without any it dumps the stacks of
all threads to stacks/rank-00000.txt and to stderr, and ends the process. If Python itself cannot run, because C code
holds the interpreter's lock, faulthandler does it from C after twice that time, to the file alone.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TextIO

from cogvlm_ft.run_folder import RunFolder

EXIT_CODE = 1
TICK_S = 1.0
"""Between two checks. If the thread itself was suspended for longer, with its job, that counts as at most 2 ticks."""

_last = threading.Event()  # set by progress(), cleared by every check


def progress() -> None:
    """Report that this rank makes progress.

    Called after every micro-batch, decoded token, tensor that is read, file that is written; it costs less than a
    microsecond, watched or not.
    """
    _last.set()


@contextmanager
def watched(run_folder: Path, rank: int, timeout_s: float | None) -> Iterator[None]:
    """Watch this process until the block exits, with or without an exception; a timeout of None watches nothing."""
    if timeout_s is None:
        yield
        return
    path = RunFolder(run_folder).stacks / f"rank-{rank:05d}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    progress()
    with path.open("a", encoding="utf-8") as file:  # kept open: C code cannot open files
        _arm(file, timeout_s)
        thread = threading.Thread(target=_watch, args=(file, rank, timeout_s, stop), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            faulthandler.cancel_dump_traceback_later()
            if not path.stat().st_size:
                path.unlink()
                with suppress(OSError):  # other ranks' files are still in it
                    path.parent.rmdir()


def _watch(file: TextIO, rank: int, timeout_s: float, stop: threading.Event) -> None:
    tick_s = min(TICK_S, timeout_s / 4)
    idle_s, checked_at, armed_at = 0.0, time.monotonic(), time.monotonic()
    while not stop.wait(tick_s):
        now = time.monotonic()
        idle_s = 0.0 if _last.is_set() else idle_s + min(now - checked_at, 2 * tick_s)
        _last.clear()
        checked_at = now
        if idle_s >= timeout_s:
            _end(file, rank, timeout_s)
        if now - armed_at > timeout_s / 4:
            _arm(file, timeout_s)
            armed_at = now


def _arm(file: TextIO, timeout_s: float) -> None:
    """Schedule the dump from C, for the case that the thread cannot run."""
    faulthandler.dump_traceback_later(2 * timeout_s, exit=True, file=file)


def _end(file: TextIO, rank: int, timeout_s: float) -> None:
    """Write the stacks to both outputs and end the process without clean-up, which would wait for other ranks."""
    title = (
        f"rank {rank} (process {os.getpid()}) made no progress for {timeout_s:g} s (train.hang_timeout_s) and ends, "
        f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}. Its stacks, also in {file.name}:"
    )
    for output in (file, sys.stderr):
        output.write(f"\n{title}\n")
        output.flush()
        faulthandler.dump_traceback(output, all_threads=True)
        output.flush()
    os.fsync(file.fileno())
    os._exit(EXIT_CODE)
