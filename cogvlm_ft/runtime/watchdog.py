"""End a rank that makes no progress and write its stacks, so that its job ends instead of hanging.

A thread checks every second for calls of `progress()`. After `train.hang_timeout_s` without any, on this rank and on
all others, it dumps the stacks of all threads to stacks/rank-00000.txt and to stderr, and ends the process: a rank that
waits for another is not a hang while that other makes progress. Ranks see each other's progress by the time of one file
in output_dir.

If Python itself cannot run, because C code holds the interpreter's lock, another process (watchdog_guard.py) aborts
this one after twice that time. Both count the checks that they make, not the time, so that a suspended job is not a
hang.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, TextIO

from cogvlm_ft.plain_files import sync_open
from cogvlm_ft.run_folder import RunFolder

logger = logging.getLogger(__name__)

EXIT_CODE = 1
TICK_S = 1.0
"""Seconds between two checks. If the whole job was suspended for longer, that counts as at most 2 ticks."""
SHARED_PER_TIMEOUT = 8
"""How often a rank reports its progress to the others, per timeout."""
GUARD = Path(__file__).with_name("watchdog_guard.py")

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
    stop = threading.Event()
    progress()
    with ExitStack() as stack:
        file = stack.enter_context(_stacks_file(RunFolder(run_folder).stacks / f"rank-{rank:05d}.txt"))
        shared = stack.enter_context(_shared_progress(RunFolder(run_folder).progress))
        tick_s = min(TICK_S, timeout_s / 4)
        guard = stack.enter_context(_guarded(file, rank, timeout_s, tick_s))
        thread = threading.Thread(
            target=_watch, args=(file, rank, timeout_s, tick_s, shared, guard, stop), name="watchdog", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@contextmanager
def _stacks_file(path: Path) -> Iterator[TextIO]:
    """Open the file that takes the stacks, now: it may be impossible later. Without one they go to stderr."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        logger.warning("%s cannot be written: %s; stacks go to the log", path, error)
        yield sys.stderr
        return
    try:
        with file:
            yield file
    finally:
        with suppress(OSError):  # other ranks' files are still in the folder
            if not path.stat().st_size:
                path.unlink()
                path.parent.rmdir()


@contextmanager
def _shared_progress(path: Path) -> Iterator[Path]:
    with suppress(OSError):
        path.touch()
    try:
        yield path
    finally:
        with suppress(OSError):
            path.unlink()


@contextmanager
def _guarded(file: TextIO, rank: int, timeout_s: float, tick_s: float) -> Iterator[int | None]:
    """Start the guard; yield where it expects a byte per tick, None without one."""
    was_enabled = faulthandler.is_enabled()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    title = (
        f"rank {rank} (process {os.getpid()}): Python could not run for {2 * timeout_s:g} s (2 x train.hang_timeout_s)"
    )
    command = [sys.executable, "-I", "-S", str(GUARD), str(os.getpid()), str(tick_s), str(2 * timeout_s / tick_s)]
    guard: subprocess.Popen[bytes] | None = None
    try:
        # In a session of its own: signals to this rank's process group are not for the guard.
        guard = subprocess.Popen(
            [*command, f"{title}. Its stacks are in {file.name}"], stdin=reading, start_new_session=True
        )
        faulthandler.enable(file)  # the guard sends SIGABRT
    except OSError as error:
        logger.warning("%s cannot be started: %s; only Python code is watched", GUARD.name, error)
    finally:
        os.close(reading)
    try:
        yield writing if guard else None
    finally:
        os.close(writing)  # which ends the guard
        if guard:
            _restore_faulthandler(was_enabled)
            guard.wait()


def _restore_faulthandler(was_enabled: bool) -> None:
    faulthandler.disable()
    if was_enabled:
        faulthandler.enable()


def _watch(
    file: TextIO, rank: int, timeout_s: float, tick_s: float, shared: Path, guard: int | None, stop: threading.Event
) -> None:
    idle_s = others_idle_s = told_s = 0.0
    seen, checked_at = _time_of(shared), time.monotonic()
    while not stop.wait(tick_s):
        now = time.monotonic()
        passed_s, checked_at = min(now - checked_at, 2 * tick_s), now
        if guard is not None:
            with suppress(OSError):  # it has ended, or was suspended until the pipe was full
                os.write(guard, b".")
        told_s += passed_s
        if _last.is_set():
            _last.clear()
            idle_s = 0.0
            if told_s >= timeout_s / SHARED_PER_TIMEOUT:
                told_s = 0.0
                with suppress(OSError):
                    os.utime(shared)
            continue
        idle_s += passed_s
        others_idle_s += passed_s
        if idle_s < timeout_s / 4:
            others_idle_s = idle_s  # nobody needs to know yet
            seen = None
            continue
        found = _time_of(shared)
        if found != seen and seen is not None:
            others_idle_s = 0.0
        seen = found
        if min(idle_s, others_idle_s) >= timeout_s:
            _end(file, rank, timeout_s)


def _time_of(path: Path) -> int | None:
    """Return when a rank last made progress. Opening the file makes NFS ask its server."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _end(file: TextIO, rank: int, timeout_s: float) -> None:
    """Write the stacks to both outputs and end the process without clean-up, which would wait for other ranks."""
    title = (
        f"rank {rank} (process {os.getpid()}) made no progress for {timeout_s:g} s (train.hang_timeout_s) and ends, "
        f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}. Its stacks, also in {file.name}:"
    )
    try:
        for output in (file, sys.stderr):
            with suppress(OSError, ValueError):  # a full disk, a closed terminal
                _write_stacks(output, title)
        with suppress(OSError, ValueError):
            sync_open(file.fileno())
    finally:
        os._exit(EXIT_CODE)


def _write_stacks(output: IO[str], title: str) -> None:
    output.write(f"\n{title}\n")
    output.flush()
    faulthandler.dump_traceback(output, all_threads=True)
    output.flush()
