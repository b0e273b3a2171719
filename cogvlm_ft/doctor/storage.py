"""Check output_dir: shared by all nodes, fast enough, large enough, and leftovers of killed runs."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from cogvlm_ft.checkpoints.checkpoint import list_checkpoints
from cogvlm_ft.doctor.examination import Examination, Finding, Reading, green, red, yellow
from cogvlm_ft.plain_files import sync, sync_open
from cogvlm_ft.planning.memory import GIB
from cogvlm_ft.run_folder import RunFolder
from cogvlm_ft.runtime.distributed import is_main

PROBE_BYTES = 256 * 2**20
PROBE_FRACTION = 0.1  # of the free space, at most
BLOCK_BYTES = 8 * 2**20
WAIT_S = 15.0  # for a file of another node; network file systems show it with a delay
SLOW_S = 600.0  # for a checkpoint
PROBES, OLD_S = (
    ".tmp-doctor-",
    3600.0,
)  # prefix of the files that are written there; older ones belong to no running examination


def _token(examination: Examination) -> Path:
    return examination.config.output_path / f"{PROBES}{examination.token}"


def read_folder(examination: Examination) -> str:
    """Write a file for the other nodes, remove files of killed examinations; return the error, empty without one."""
    folder = examination.config.output_path
    for path in folder.glob(f"{PROBES}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > OLD_S:
                path.unlink()
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _token(examination).write_text("made" if made else "", encoding="utf-8")
    except OSError as error:
        return str(error)
    return ""


def judge_folder(examination: Examination, readings: list[Reading]) -> list[Finding]:
    problem: str = readings[0].facts
    if problem:
        to_do = "use another output_dir, or fix its permissions, quota or disk"
        return [
            red(
                f"output_dir={examination.config.output_dir} on {readings[0].host}: {problem}",
                "a folder that can be written",
                to_do,
            )
        ]
    return []  # the next check reports whether all nodes share it


def read_token(examination: Examination) -> bool:
    """Wait for the file of rank 0; return whether it is visible here."""
    end = time.monotonic() + (0 if is_main() else WAIT_S)
    while not _token(examination).exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def judge_sharing(examination: Examination, readings: list[Reading]) -> list[Finding]:
    folder = examination.config.output_dir
    if not readings[0].facts:
        return []  # rank 0 could not write it, which is already reported
    blind = [part.host for part in readings if not part.facts]
    if blind:
        return [
            red(
                f"output_dir={folder} of {readings[0].host} is not that of {', '.join(blind)}",
                "one folder, since every rank writes its part of a checkpoint there",
                "use an output_dir on a file system that all nodes share",
            )
        ]
    return [green(f"output_dir={folder}" + (f" is the same on {len(readings)} nodes" if len(readings) > 1 else ""))]


def remove_probes(examination: Examination) -> None:
    """Remove the file of rank 0, and output_dir if this examination created it."""
    token = _token(examination)
    if is_main() and token.is_file():
        made = token.read_text(encoding="utf-8") == "made"
        token.unlink()
        if made:
            token.parent.rmdir()


class Disk(NamedTuple):
    """A measurement: num_bytes took `seconds` to write, with fsync. free: bytes that this user may still write.

    is_synced: the file system can sync files and folders.
    """

    num_bytes: int
    seconds: float
    free: int
    problem: str
    is_synced: bool = True


def read_disk(examination: Examination) -> Disk | None:
    """Write a file on all nodes at once, as for a checkpoint; None if the folder does not exist."""
    folder = examination.config.output_path
    if not folder.is_dir():
        return None
    free = shutil.disk_usage(folder).free
    num_bytes = max(BLOCK_BYTES, int(min(PROBE_BYTES, PROBE_FRACTION * free)) // BLOCK_BYTES * BLOCK_BYTES)
    path = folder / f"{_token(examination).name}-{os.getpid()}"
    block = os.urandom(BLOCK_BYTES)  # file systems may store zeros without writing them
    start, is_synced = time.perf_counter(), True
    try:
        with path.open("wb") as file:
            for _ in range(num_bytes // BLOCK_BYTES):
                file.write(block)
            file.flush()
            is_synced = sync_open(file.fileno()) and sync(folder)
        problem = ""
    except OSError as error:
        problem = str(error)
    finally:
        seconds = time.perf_counter() - start
        path.unlink(missing_ok=True)
    return Disk(num_bytes, seconds, free, problem, is_synced)


def judge_disk(examination: Examination, readings: list[Reading]) -> list[Finding]:
    disks = [part for part in readings if part.facts]
    for part in disks:
        if part.facts.problem:
            found = f"writing {part.facts.num_bytes / 2**20:.0f} MiB on {part.host}: {part.facts.problem}"
            return [red(found, "a complete file", "make room, raise the quota or ulimit -f, or use another output_dir")]
    if not disks:
        return []  # a missing folder is already reported
    speed = sum(part.facts.num_bytes / part.facts.seconds for part in disks)
    findings = [_judge_speed(examination, speed), *_judge_room(examination, min(part.facts.free for part in disks))]
    if not all(part.facts.is_synced for part in disks):
        found = f"output_dir={examination.config.output_dir}: its file system cannot sync folders (fsync)"
        to_do = "nothing if power failures are rare: one can cost the newest checkpoint, never an earlier one"
        findings.append(yellow(found, to_do))
    return findings


def _judge_speed(examination: Examination, speed: float) -> Finding:
    found = f"{speed / 1e9:.2f} GB/s written and synced by all nodes together"
    if examination.estimate is None:
        return green(found)
    taken = examination.estimate.disk / speed
    found = f"{found}; a checkpoint of {examination.estimate.disk / 1e9:.2f} GB takes {taken:.1f} s"
    if taken <= SLOW_S:
        return green(found)
    to_do = "use a faster file system: a run that receives a stop signal needs this time to save"
    return yellow(f"{found}, expected at most {SLOW_S:g} s", to_do)


def _judge_room(examination: Examination, free: int) -> list[Finding]:
    """Judge the room for keep_last checkpoints, the best one, and the one that is being written."""
    config, estimate = examination.config, examination.estimate
    if estimate is None:
        return [green(f"{free / GIB:.1f} GiB free")]
    there = len(list_checkpoints(RunFolder(config.output_path).checkpoints))
    number = max(1, config.checkpoint.keep_last + 2 - there)
    needed = number * estimate.disk
    found = f"{free / GIB:.2f} GiB free, {number} more checkpoints take {needed / GIB:.2f}"
    milestones = config.checkpoint.keep_every_steps
    found += f", and one more every {milestones} steps" if milestones else ""
    if needed <= free:
        return [green(found)]
    to_do = "make room, lower checkpoint.keep_last, or use another output_dir"
    return [red(found, f"room for checkpoint.keep_last={config.checkpoint.keep_last} + 2", to_do)]


class Leftovers(NamedTuple):
    """Names of folders in checkpoints/."""

    unfinished: list[str]
    damaged: list[str]


def read_leftovers(examination: Examination) -> Leftovers:
    checkpoints = RunFolder(examination.config.output_path).checkpoints
    return Leftovers(
        sorted(path.name for path in checkpoints.glob(".tmp-*")),
        sorted(path.name for path in checkpoints.glob("damaged-*")),
    )


def judge_leftovers(examination: Examination, readings: list[Reading]) -> list[Finding]:
    found: Leftovers = readings[0].facts
    folder = RunFolder(examination.config.output_path).checkpoints
    findings = []
    if found.unfinished:
        to_do = "nothing if no run is active there: the next run removes it"
        findings.append(yellow(f"half-written in {folder}: {', '.join(found.unfinished)}", to_do))
    if found.damaged:
        findings.append(yellow(f"damaged in {folder}: {', '.join(found.damaged)}", "find the cause, then delete it"))
    return findings or [green("no files of killed runs")]
