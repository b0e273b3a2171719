"""Checks of output_dir: seen by all nodes, fast enough, large enough, and what killed runs left there."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from cogvlm_ft.checkpoints.checkpoint import list_checkpoints
from cogvlm_ft.doctor.examination import Check, Examination, Finding, Seen, green, red, yellow
from cogvlm_ft.planning.memory import GIB
from cogvlm_ft.run_folder import RunFolder
from cogvlm_ft.runtime.distributed import is_main

PROBE_BYTES = 256 * 2**20
PROBE_SHARE = 0.1  # of the free space, at most
BLOCK_BYTES = 8 * 2**20
WAIT_S = 15.0  # for a file of another node; network file systems show it late
SLOW_S = 600.0  # for a checkpoint
PROBES, OLD_S = ".tmp-doctor-", 3600.0  # names of what is written there; older ones are nobody's


def _token(examination: Examination) -> Path:
    return examination.config.output_path / f"{PROBES}{examination.token}"


def look_at_folder(examination: Examination) -> str:
    """Rank 0 leaves a file there for the others, and takes away what killed examinations left; says what is wrong."""
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


def judge_folder(examination: Examination, seen: list[Seen]) -> list[Finding]:
    problem: str = seen[0].facts
    if problem:
        to_do = "take another output_dir, or mend its permissions, quota or disk"
        return [red(f"output_dir={examination.config.output_dir} on {seen[0].host}: {problem}", "a file there", to_do)]
    return []  # the next check says whether all see it


def look_for_token(examination: Examination) -> bool:
    end = time.monotonic() + (0 if is_main() else WAIT_S)
    while not _token(examination).exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def judge_sharing(examination: Examination, seen: list[Seen]) -> list[Finding]:
    folder = examination.config.output_dir
    if not seen[0].facts:
        return []  # rank 0 could not write it, as was said
    blind = [part.host for part in seen if not part.facts]
    if blind:
        return [
            red(
                f"output_dir={folder} of {seen[0].host} is not that of {', '.join(blind)}",
                "one folder: every rank writes its part of a checkpoint there",
                "an output_dir on a file system that all nodes share",
            )
        ]
    return [green(f"output_dir={folder}" + (f" is the same on {len(seen)} nodes" if len(seen) > 1 else ""))]


def remove_probes(examination: Examination) -> None:
    """Rank 0's file, and output_dir if this examination made it; the disk check removes its own."""
    token = _token(examination)
    if is_main() and token.is_file():
        made = token.read_text(encoding="utf-8") == "made"
        token.unlink()
        if made:
            token.parent.rmdir()


class Disk(NamedTuple):
    """num_bytes took seconds to write, with fsync; free: bytes that this user may still write."""

    num_bytes: int
    seconds: float
    free: int
    problem: str


def look_at_disk(examination: Examination) -> Disk | None:
    """All nodes at once, as in a checkpoint. None where the folder is not there."""
    folder = examination.config.output_path
    if not folder.is_dir():
        return None
    free = shutil.disk_usage(folder).free
    num_bytes = max(BLOCK_BYTES, int(min(PROBE_BYTES, PROBE_SHARE * free)) // BLOCK_BYTES * BLOCK_BYTES)
    path = folder / f"{_token(examination).name}-{os.getpid()}"
    block = os.urandom(BLOCK_BYTES)  # zeros would be stored for nothing
    start = time.perf_counter()
    try:
        with path.open("wb") as file:
            for _ in range(num_bytes // BLOCK_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        problem = ""
    except OSError as error:
        problem = str(error)
    finally:
        seconds = time.perf_counter() - start
        path.unlink(missing_ok=True)
    return Disk(num_bytes, seconds, free, problem)


def judge_disk(examination: Examination, seen: list[Seen]) -> list[Finding]:
    disks = [part for part in seen if part.facts]
    for part in disks:
        if part.facts.problem:
            found = f"writing {part.facts.num_bytes / 2**20:.0f} MiB on {part.host}: {part.facts.problem}"
            return [red(found, "a whole file", "make room, raise the quota or ulimit -f, or take another output_dir")]
    if not disks:
        return []  # that it is not there was said
    speed = sum(part.facts.num_bytes / part.facts.seconds for part in disks)
    return [_judge_speed(examination, speed), *_judge_room(examination, min(part.facts.free for part in disks))]


def _judge_speed(examination: Examination, speed: float) -> Finding:
    found = f"{speed / 1e9:.2f} GB/s written and synced by all nodes together"
    if examination.estimate is None:
        return green(found)
    taken = examination.estimate.disk / speed
    found = f"{found}; a checkpoint of {examination.estimate.disk / 1e9:.2f} GB takes {taken:.1f} s"
    if taken <= SLOW_S:
        return green(found)
    to_do = "a faster file system: a run that is told to stop needs that long to save"
    return yellow(f"{found}, warned about above {SLOW_S:g} s", to_do)


def _judge_room(examination: Examination, free: int) -> list[Finding]:
    """A run holds keep_last checkpoints, the best, and the one that is being written."""
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
    to_do = "make room, lower checkpoint.keep_last, or take another output_dir"
    return [red(found, f"room for checkpoint.keep_last={config.checkpoint.keep_last} + 2", to_do)]


class Leftovers(NamedTuple):
    """Names of folders in checkpoints/."""

    unfinished: list[str]
    damaged: list[str]


def look_for_leftovers(examination: Examination) -> Leftovers:
    checkpoints = RunFolder(examination.config.output_path).checkpoints
    return Leftovers(
        sorted(path.name for path in checkpoints.glob(".tmp-*")),
        sorted(path.name for path in checkpoints.glob("damaged-*")),
    )


def judge_leftovers(examination: Examination, seen: list[Seen]) -> list[Finding]:
    found: Leftovers = seen[0].facts
    folder = RunFolder(examination.config.output_path).checkpoints
    findings = []
    if found.unfinished:
        to_do = "if no training is at work there, nothing: the next one removes it"
        findings.append(yellow(f"half-written in {folder}: {', '.join(found.unfinished)}", to_do))
    if found.damaged:
        findings.append(yellow(f"damaged in {folder}: {', '.join(found.damaged)}", "delete it when you know why"))
    return findings or [green("none of killed runs")]


FOLDER = Check("output folder", look_at_folder, judge_folder)
SHARING = Check("output folder", look_for_token, judge_sharing, who="node")
DISK = Check("disk", look_at_disk, judge_disk, who="node")
LEFTOVERS = Check("leftovers", look_for_leftovers, judge_leftovers)
