"""The lock of a folder: one training run per output_dir, one demo or rehearsal per folder, on any file system.

    output_dir/.lock-000003      {"host": ..., "pid": ..., "job": ..., ...}; its mtime is the owner's heartbeat

The owner is whoever wrote the file with the highest number. A new file is linked into place, which only one process
can do per number, and NFS does at once for all hosts. The file with the highest number is never deleted, so a number is
never used twice: of any number of processes that find the owner gone, one becomes the next owner.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.plain_files import open_new, read_json, sync_open
from cogvlm_ft.runtime.outcome import OUTCOME_VARIABLE
from cogvlm_ft.runtime.processes import find_process

logger = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
MISSED_HEARTBEATS = 6
"""Number of missed heartbeats after which an owner on another host is considered dead."""
WRITTEN_AFTER_S = 5.0
"""How long a lock may be unreadable: where there are no hard links, it is created before its content is written."""
POLL_S = 0.5
LOST_EXIT_CODE = 1
STOP = "Stop it with launch/stop.py"


@dataclass(frozen=True)
class Owner:
    """The process of a folder. machine: its boot and PID namespace, within which `pid` and `started` name a process.

    started: seconds after boot; in locks of earlier versions, since 1970 by the clock of then.
    batch: what scancel calls its job, if a batch script waits for it.
    """

    host: str
    machine: str
    pid: int
    started: float
    job: str | None
    attempt: int
    is_released: bool = False
    batch: str | None = None

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


class Use(NamedTuple):
    """The use of a folder, for messages: `where` names it, `setting` chooses another, `stop` ends the owner."""

    work: str
    where: str
    setting: str
    stop: str = "Stop it"


def this_process() -> Owner:
    boot = Path("/proc/sys/kernel/random/boot_id")
    machine = boot.read_text().strip() if boot.exists() else ""
    with contextlib.suppress(OSError):
        machine += f"/{Path('/proc/self/ns/pid').stat().st_ino}"
    job = os.environ.get("SLURM_JOB_ID")
    attempt = os.environ.get("SLURM_RESTART_COUNT", "")
    pid = os.getpid()
    process = find_process(pid)
    started = process.started_s if process else 0.0
    batch = job_to_signal(os.environ)
    num_restarts = int(attempt) if attempt.isdecimal() else 0
    return Owner(socket.gethostname(), machine, pid, started, job, num_restarts, batch=batch)


def job_to_signal(environment: Mapping[str, str]) -> str | None:
    """Return what scancel calls the job whose batch script waits for this process; of an array, this task alone."""
    job = environment.get("SLURM_JOB_ID")
    if job is None or OUTCOME_VARIABLE not in environment:
        return None
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else job


def current_owner(folder: Path) -> Owner | None:
    """Return the process that trains there; None if none does, as far as can be seen from here."""
    newest = _newest(folder)
    owner = read_owner(newest) if newest else None
    if owner is None or owner.is_released or (is_on_this_machine(owner) and not _is_running(owner)):
        return None
    return owner


def is_on_this_machine(owner: Owner) -> bool:
    return owner.machine == this_process().machine


@contextlib.contextmanager
def run_lock(folder: Path, use: Use | None = None) -> Iterator[tuple[str, Owner]]:
    """Own the folder until the block ends; create it if necessary. Yields the name of the lock file and its content.

    use: for messages; that of a training run by default. Raises ConfigError if another process owns the folder.

    Waits up to a minute to find out whether an owner on another host is alive.
    """
    me = this_process()
    path = _acquire(folder, me, use or Use("training run", f"output_dir={folder}", "output_dir", STOP))
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, ended), daemon=True, name="run lock")
    heart.start()
    try:
        yield path.name, me
    finally:
        ended.set()
        heart.join()
        with contextlib.suppress(OSError):
            _replace(path, me, is_released=True)


def _acquire(folder: Path, me: Owner, use: Use) -> Path:
    """Return the lock file that makes this process the owner."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _become_owner(folder, me, use)
    except (PermissionError, FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"{use.where}: {error.strerror} ({error.filename}); expected a folder that this account may write. "
            "Choose another or change its permissions"
        ) from None
    except OSError as error:
        reason = "read-only here" if error.errno == errno.EROFS else error.strerror or str(error)
        raise ConfigError(
            f"{use.where}: {reason}; expected a folder on a disk that can be written. Free space on it, or "
            "choose another"
        ) from None


def _become_owner(folder: Path, me: Owner, use: Use) -> Path:
    while True:
        newest = _newest(folder)
        if newest is not None:
            owner = _read_whole(newest)
            if owner is None and newest.exists():
                raise ConfigError(
                    f"{newest}: not a lock of a run; expected one. Delete it if no {use.work} is writing there"
                )
            if owner is not None and _is_alive(owner, me, newest):
                raise ConfigError(
                    f"{use.where}: another {use.work} is writing there: {owner}; expected one per folder. "
                    f"{use.stop}, wait for its end, or choose another {use.setting}"
                )
            if owner is not None and not owner.is_released:
                logger.warning("%s: its former owner, %s, has ended; this run continues", use.where, owner)
        path = _lock_file(folder, 1 + (_number(newest) if newest else 0))
        if _create(path, me):
            if _newest(folder) == path:
                for older in _lock_files(folder)[:-1]:
                    older.unlink(missing_ok=True)
                return path
            path.unlink()  # others have been owners since this process looked


def _is_alive(owner: Owner, me: Owner, path: Path) -> bool:
    """Decide whether the owner still trains."""
    if owner.is_released:
        return False
    if owner.machine == me.machine:
        return _is_running(owner)
    if owner.job is not None and owner.job == me.job and owner.attempt < me.attempt:
        return False  # Slurm has ended the former attempt of this job
    logger.warning("%s belongs to %s; waiting for a sign of life", path.parent, owner)
    deadline, seen = time.monotonic() + MISSED_HEARTBEATS * HEARTBEAT_S, _mtime(path)
    while time.monotonic() < deadline:
        time.sleep(HEARTBEAT_S / 5)
        if _mtime(path) != seen:  # released, or alive, or taken over
            return path == _newest(path.parent) and not (read_owner(path) or owner).is_released
    return False


def _is_running(owner: Owner) -> bool:
    process = find_process(owner.pid)
    if process is None:
        return False
    return process.started_s == owner.started or abs(process.started_s + psutil.boot_time() - owner.started) < 1


def _beat(path: Path, ended: threading.Event) -> None:
    """Renew the heartbeat; end this process at once if another has become the owner, because both would write."""
    while not ended.wait(HEARTBEAT_S):
        newest = None
        with contextlib.suppress(OSError):
            os.utime(path)
        with contextlib.suppress(OSError):  # of a server that is away: this thread must live on
            newest = _newest(path.parent)
        if newest is not None and newest != path:
            logger.error("%s: another training run has taken it over while this one was suspended; ending", path.parent)
            os._exit(LOST_EXIT_CODE)


def _lock_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(".lock-" + "[0-9]" * 6))


def _newest(folder: Path) -> Path | None:
    return max(_lock_files(folder), default=None)


def _lock_file(folder: Path, number: int) -> Path:
    return folder / f".lock-{number:06d}"


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _mtime(path: Path) -> int | None:
    """Return the time of the last heartbeat. Opening the file makes NFS ask its server."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def read_owner(path: Path) -> Owner | None:
    """Return the owner, None if the file is not ours or just vanished."""
    try:
        return Owner(**read_json(path))
    except (OSError, ValueError, TypeError):
        return None


def _read_whole(path: Path) -> Owner | None:
    """Return what `read_owner` does; wait for one that is being written, or for a server that is away for a moment."""
    end_s = time.monotonic() + WRITTEN_AFTER_S
    while (owner := read_owner(path)) is None and path.exists() and time.monotonic() < end_s:
        time.sleep(POLL_S)
    return owner


def _write_new(path: Path, owner: Owner) -> Path:
    partial = path.with_name(f".tmp{path.name}-{owner.host}-{owner.pid}")
    try:
        with open_new(partial, "w") as file:
            json.dump(asdict(owner), file)
            file.flush()
            sync_open(file.fileno())
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return partial


def _create(path: Path, owner: Owner) -> bool:
    """Create the lock file whole, or not at all if it exists."""
    partial = _write_new(path, owner)
    try:
        path.hardlink_to(partial)
    except FileExistsError:
        return False
    except OSError:  # no hard links on this file system
        return _create_exclusively(path, partial.read_text(encoding="utf-8"))
    finally:
        partial.unlink(missing_ok=True)
    return True


def _create_exclusively(path: Path, content: str) -> bool:
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(content)
    except OSError:  # a full disk: half a lock would keep everybody out
        path.unlink(missing_ok=True)
        raise
    return True


def _replace(path: Path, owner: Owner, *, is_released: bool) -> None:
    """Mark the lock as released. Nobody else replaces the newest file, so this loses no other owner."""
    _write_new(path, Owner(**{**asdict(owner), "is_released": is_released})).replace(path)
