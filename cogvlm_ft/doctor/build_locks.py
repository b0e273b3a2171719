"""Check locks of compilers that were killed: the next build of the same extension waits indefinitely, silently."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from cogvlm_ft.doctor.examination import Examination, Finding, Reading, green, red, yellow
from cogvlm_ft.plain_files import real_path
from cogvlm_ft.runtime.compiled_extensions import build_root, problem_of

STALE_AFTER_S = 600  # a build takes one minute; on a shared home directory it may run on another node


class Lock(NamedTuple):
    """A lock file. maker: the process on this host that holds it, None without one; removed: by this check."""

    path: Path
    age_s: float
    maker: int | None
    removed: bool

    @property
    def is_stale(self) -> bool:
        return self.maker is None and self.age_s > STALE_AFTER_S


def read_locks(examination: Examination) -> list[Lock]:
    """Find the locks of torch's extensions, ROOT/[py311_cu128/]NAME/lock; remove stale ones with --fix."""
    found = []
    for path in sorted({*build_root().glob("*/lock"), *build_root().glob("*/*/lock")}):
        with contextlib.suppress(FileNotFoundError):  # built meanwhile, or removed from another node
            lock = Lock(path, time.time() - path.stat().st_mtime, _maker_of(path), removed=False)
            if lock.is_stale and examination.fix:
                path.unlink()
                lock = lock._replace(removed=True)
            found.append(lock)
    return found


def _maker_of(path: Path) -> int | None:
    """Find the process that has the file open, as torch does while it builds."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if any(file.path == str(real_path(path)) for file in process.open_files()):
                return process.pid
    return None


def judge_locks(_: Examination, readings: list[Reading]) -> list[Finding]:
    """Judge each lock once. Every node reads a lock on a shared file system; one of them may know its maker."""
    locks: dict[Path, Lock] = {}
    for lock in (lock for part in readings for lock in part.facts):
        known = locks.get(lock.path)
        if known is None or known.maker is None:
            locks[lock.path] = lock
    findings = [_judge_lock(lock) for lock in locks.values()]
    return [*findings, *_judge_root()] or [green(f"none in {build_root()}")]


def _judge_root() -> list[Finding]:
    """Report a folder of compiled extensions that cannot be written, as with a read-only or missing HOME."""
    root = build_root()
    problem = problem_of(root)
    if not problem:
        return []
    found = f"{root} cannot be written ({problem}): optimizer offload compiles its Adam in a temporary folder instead"
    return [yellow(found, "set TORCH_EXTENSIONS_DIR to a folder that every node can write")]


def _judge_lock(lock: Lock) -> Finding:
    if lock.removed:
        return green(f"{lock.path} was {lock.age_s / 60:.0f} min old; removed")
    found = f"{lock.path} is {lock.age_s / 60:.0f} min old"
    if lock.maker is not None:
        return yellow(f"{found}, held by process {lock.maker}", "wait until its build ends")
    if lock.is_stale:
        to_do = f"launch/doctor.py --fix, or rm {lock.path}, unless a build runs on another node"
        return red(f"{found}, and no process here holds it", "no lock: training would wait indefinitely", to_do)
    return yellow(
        f"{found}, and no process here holds it", f"if it still exists in {STALE_AFTER_S / 60:.0f} min, remove it"
    )
