"""Locks of compilers that were killed: whoever wants the same extension next waits for ever, and says nothing."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import NamedTuple

import psutil
from torch.utils.cpp_extension import get_default_build_root

from cogvlm_ft.doctor.examination import Check, Examination, Finding, Seen, green, red, yellow

STALE_AFTER_S = 600  # a build takes one minute; on a shared home it may be that of another node


class Lock(NamedTuple):
    """maker: the process on this host that holds it, None if there is none. removed: just now."""

    path: Path
    age_s: float
    maker: int | None
    removed: bool

    @property
    def is_stale(self) -> bool:
        return self.maker is None and self.age_s > STALE_AFTER_S


def build_root() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def look_for_locks(examination: Examination) -> list[Lock]:
    """Of torch's extensions, ROOT/[py311_cu128/]NAME/lock; removes stale ones if that is asked for."""
    found = []
    for path in sorted({*build_root().glob("*/lock"), *build_root().glob("*/*/lock")}):
        with contextlib.suppress(FileNotFoundError):  # just built, or removed from another node
            lock = Lock(path, time.time() - path.stat().st_mtime, _maker_of(path), removed=False)
            if lock.is_stale and examination.fix:
                path.unlink()
                lock = lock._replace(removed=True)
            found.append(lock)
    return found


def _maker_of(path: Path) -> int | None:
    """torch keeps the file open while it builds."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if any(file.path == str(path.resolve()) for file in process.open_files()):
                return process.pid
    return None


def judge_locks(_: Examination, seen: list[Seen]) -> list[Finding]:
    """A lock on a shared file system is seen by every node; one of them may know its maker."""
    locks: dict[Path, Lock] = {}
    for lock in (lock for part in seen for lock in part.facts):
        known = locks.get(lock.path)
        if known is None or known.maker is None:
            locks[lock.path] = lock
    return [_judge_lock(lock) for lock in locks.values()] or [green(f"none in {build_root()}")]


def _judge_lock(lock: Lock) -> Finding:
    if lock.removed:
        return green(f"{lock.path} was {lock.age_s / 60:.0f} min old and is removed")
    found = f"{lock.path} is {lock.age_s / 60:.0f} min old"
    if lock.maker is not None:
        return yellow(f"{found}, held by process {lock.maker}", "wait until it has built its extension")
    if lock.is_stale:
        to_do = f"launch/doctor.py --fix, or rm {lock.path}, unless a build is at work on another node"
        return red(f"{found}, and nobody here holds it", "no lock: a training would wait for ever", to_do)
    return yellow(
        f"{found}, and nobody here holds it", f"if it is still there in {STALE_AFTER_S / 60:.0f} min, remove it"
    )


LOCKS = Check("build locks", look_for_locks, judge_locks, who="node")
