"""Writes one shard: a tar and, beside it, its offsets file."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvlm_ft.data.record import Record, record_to_json
from cogvlm_ft.data.tars import scan_tar
from shards.candidates import Candidate, Problem
from shards.checks import CheckedSample, check_candidate
from shards.layout import Slice


@dataclass(frozen=True)
class PackSettings:
    """What a worker needs besides its slice."""

    images: Path
    out: Path
    max_pixels: int


def write_shard(part: Slice, settings: PackSettings) -> int:
    """Check the candidates and write the good ones; the number of candidates. Same slice, same bytes."""
    tar_path, offsets_path = shard_paths(part.name, settings.out)
    unfinished = unfinished_path(tar_path)
    rejected: list[dict[str, Any]] = []
    records = _write_tar(part, settings, unfinished, rejected)
    content = _describe(unfinished, records, rejected)
    unfinished.replace(tar_path)
    write_atomically(offsets_path, to_json_bytes(content))
    return len(part.candidates)


def shard_paths(name: str, out: Path) -> tuple[Path, Path]:
    """(tar, offsets file)"""
    return out / f"{name}.tar", out / f"{name}.json"


def is_written(part: Slice, out: Path) -> bool:
    """True if an earlier run has finished this shard."""
    tar_path, offsets_path = shard_paths(part.name, out)
    try:
        return bool(json.loads(offsets_path.read_bytes())["size"] == tar_path.stat().st_size)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def rejection(problem: Problem, candidate: Candidate | None = None, key: str | None = None) -> dict[str, Any]:
    """A line of rejected.jsonl."""
    return {
        "level": problem.level,
        "reason": problem.reason,
        "image": candidate.image if candidate else None,
        "key": key,
        "source": problem.source,
        "detail": problem.detail,
    }


def to_json_bytes(content: object) -> bytes:
    """Compact UTF-8 JSON. Bytes of the input that were no UTF-8 come out as JSON escapes."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def unfinished_path(path: Path) -> Path:
    """Where a file is while it is written; each process has its own, so that two never write into one."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def write_atomically(path: Path, data: bytes) -> None:
    """The whole file or none."""
    unfinished = unfinished_path(path)
    unfinished.write_bytes(data)
    unfinished.replace(path)


def _write_tar(part: Slice, settings: PackSettings, path: Path, rejected: list[dict[str, Any]]) -> list[Record]:
    # Imported here because webdataset imports torch if there is one: seconds that only a writer needs to spend.
    from webdataset.writer import TarWriter

    records = []
    fixed = {"mtime": 0, "user": "shards", "group": "shards", "mode": 0o444}  # the same bytes on every machine
    with path.open("wb") as file, TarWriter(file, encoder=False, **fixed) as tar:
        for key, candidate in part.candidates:
            sample, problems = check_candidate(candidate, key, settings.images, settings.max_pixels)
            rejected.extend(rejection(problem, candidate, key) for problem in problems)
            if sample:
                tar.write(_members(sample))
                records.append(sample.record)
    return records


def _members(sample: CheckedSample) -> dict[str, Any]:
    return {"__key__": sample.record.key, sample.ext: sample.image, "json": record_to_json(sample.record)}


def _describe(tar_path: Path, records: list[Record], rejected: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of the offsets file; the offsets are found by reading the tar back."""
    entries, losses = scan_tar(tar_path)
    assert [entry.key for entry in entries] == [record.key for record in records] and not losses
    targets = [target for record in records for target in record.targets]
    with tar_path.open("rb") as file:
        sha256 = hashlib.sha256()
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    return {
        "sha256": sha256.hexdigest(),
        "size": tar_path.stat().st_size,
        "num_samples": len(records),
        "num_targets": len(targets),
        "num_boxes": sum(len(target.boxes_xyxy) for target in targets),
        "num_absent": sum(not target.boxes_xyxy for target in targets),
        "num_turns": sum(len(record.turns) for record in records),
        "samples": [
            {
                "key": entry.key,
                "ext": entry.ext,
                "image": [entry.image_offset, entry.image_size],
                "json": [entry.json_offset, entry.json_size],
            }
            for entry in entries
        ],
        "rejected": rejected,
    }
