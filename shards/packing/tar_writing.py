"""Writes one shard: a tar and, beside it, its offsets file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

from cogvlm_ft.data.record import BadSampleError, Record, record_to_json
from cogvlm_ft.shards.negatives.in_build import Absence, with_absent
from cogvlm_ft.shards.packing.candidates import Problem
from cogvlm_ft.shards.packing.checks import CheckedSample, check_candidate
from cogvlm_ft.shards.packing.files import expect
from cogvlm_ft.shards.packing.shrink import shrink_sample
from cogvlm_ft.shards.packing.splits import Slice
from cogvlm_ft.shards.packing.staging import Spooled, read_slice
from cogvlm_ft.shards.packing.verify import VERIFY

_NUM_AHEAD = 64
_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE


@dataclass(frozen=True)
class PackSettings:
    """What a worker needs besides its slice."""

    spool: Path
    images: Path
    out: Path
    max_pixels: int
    verify: str = VERIFY[0]
    apply_exif: bool = False
    max_side: int | None = None
    absence: Absence | None = None


def write_shard(part: Slice, settings: PackSettings) -> int:
    """Check the candidates and write the good ones; the number of candidates. Same slice, same bytes."""
    tar_path, offsets_path = shard_paths(part.name, settings.out)
    unfinished = unfinished_path(tar_path)
    records: list[Record] = []
    rejected: list[dict[str, Any]] = []
    num_added: Counter[str] = Counter()
    with unfinished.open("wb", buffering=0) as file:
        tar = _Tar(file)
        spooled_parts = read_slice(settings.spool, part, with_others=settings.absence is not None)
        for spooled in _asked_for_ahead(spooled_parts, settings.images):
            sample, problems = prepare_sample(spooled, settings, num_added)
            rejected.extend(rejection(problem, spooled.candidate.image, spooled.key) for problem in problems)
            if sample:
                tar.add_sample(sample)
                records.append(sample.record)
        tar.finish()
    unfinished.replace(tar_path)
    content = {**tar.identity(), **_counts(records), "samples": tar.samples, "rejected": rejected}
    if settings.absence:
        content["negatives"] = dict(sorted(num_added.items()))
    write_atomically(offsets_path, to_json_bytes(content))
    return len(part)


def _asked_for_ahead(parts: Iterable[Spooled], images: Path) -> Iterator[Spooled]:
    """The same parts; the disk reads the photos of the next ones meanwhile."""
    ahead: deque[Spooled] = deque()
    for spooled in parts:
        expect(images, spooled.candidate.image)
        ahead.append(spooled)
        if len(ahead) > _NUM_AHEAD:
            yield ahead.popleft()
    yield from ahead


def prepare_sample(
    spooled: Spooled, settings: PackSettings, num_added: Counter[str]
) -> tuple[CheckedSample | None, list[Problem]]:
    """From what the annotation says to what the shard gets, one stage after another. num_added: absent targets."""
    candidate, key = spooled.candidate, spooled.key
    sample, problems = check_candidate(
        candidate, key, settings.images, settings.max_pixels, settings.verify, apply_exif=settings.apply_exif
    )
    if sample and settings.absence:
        sample = with_absent(sample, spooled, settings.spool, settings.absence, num_added)
    if sample and settings.max_side:
        try:
            sample = shrink_sample(sample, settings.max_side)
        except BadSampleError as error:  # its structure was good, but it cannot be decoded
            return None, [*problems, Problem("sample", error.reason, error.detail, candidate.source)]
    return sample, problems


def shard_paths(name: str, out: Path) -> tuple[Path, Path]:
    """(tar, offsets file)"""
    return out / f"{name}.tar", out / f"{name}.json"


def is_written(part: Slice, out: Path) -> bool:
    """True if an earlier run has finished this shard, and its offsets file says all that it should."""
    tar_path, offsets_path = shard_paths(part.name, out)
    try:
        content = json.loads(offsets_path.read_bytes())
        return bool(content["size"] == tar_path.stat().st_size) and _is_whole(content, len(part))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def _is_whole(content: dict[str, Any], num_candidates: int) -> bool:
    """Raises nearly anything if it is not even of this form."""
    rows = content["rejected"]
    names = rejection(Problem("", "", "", "")).keys()
    numbers = [*(content[name] for name in _counts([])), *content.get("negatives", {}).values()]
    return (
        len(content["samples"]) == content["num_samples"]
        and content["num_samples"] + sum(row["level"] == "sample" for row in rows) == num_candidates
        and all(type(number) is int for number in numbers)
        and all(row.keys() == names and all(isinstance(text, str) for text in row.values()) for row in rows)
        and re.fullmatch("[0-9a-f]{64}", content["sha256"]) is not None
    )


def rejection(problem: Problem, image: str | None = None, key: str | None = None) -> dict[str, Any]:
    """A line of rejected.jsonl."""
    return {
        "level": problem.level,
        "reason": problem.reason,
        "image": image,
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


class _Tar:
    """A plain WebDataset tar: per sample its image and its record, the same bytes on every machine.

    samples: what the offsets file says about each.

    Written here and not by webdataset's TarWriter, because that needs torch (seconds) and does not tell the offsets.
    """

    def __init__(self, file: RawIOBase) -> None:
        self._file = file
        self._size = 0
        self._sha256 = hashlib.sha256()
        self.samples: list[dict[str, Any]] = []

    def add_sample(self, sample: CheckedSample) -> None:
        """Members in alphabetical order, as WebDataset writes them; all of a sample in one write."""
        key = sample.record.key
        data = {sample.ext: sample.image, "json": record_to_json(sample.record)}
        parts: list[bytes] = []
        places: dict[str, list[int]] = {}
        end = self._size
        for ext in sorted(data):
            header, content = _header(f"{key}.{ext}", len(data[ext])), data[ext]
            places[ext] = [end + len(header), len(content)]
            parts += header, content, bytes(-len(content) % _BLOCK)
            end += sum(map(len, parts[-3:]))
        self._write(b"".join(parts))
        row = {"key": key, "ext": sample.ext, "image": places[sample.ext], "json": places["json"]}
        self.samples.append(row | {"num_questions": [len(sample.record.targets), len(sample.record.turns)]})

    def finish(self) -> None:
        """Two empty blocks, then zeros up to a whole record."""
        end = self._size + 2 * _BLOCK
        self._write(bytes(-(-end // _RECORD) * _RECORD - self._size))

    def identity(self) -> dict[str, Any]:
        """Of the finished file."""
        return {"sha256": self._sha256.hexdigest(), "size": self._size}

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:  # a file without a buffer may take less than all
            left = left[self._file.write(left) :]
        self._sha256.update(data)
        self._size += len(data)


def _header(name: str, size: int) -> bytes:
    """The blocks before the data of a member."""
    if name.isascii() and size < 8**11:  # as tarfile does it, ten times faster
        start = b"%s%07o\0%s%011o\0" % (name.encode().ljust(100, b"\0"), 0o444, b"0000000\0" * 2, size)
        block = bytearray(_HEADER_OF_NOTHING)
        block[: len(start)] = start
        block[148:156] = b"        "  # the place of the checksum counts as blanks
        block[148:156] = b"%06o\0 " % sum(block)
        return bytes(block)
    return _slow_header(name, size)


def _slow_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime, info.uname, info.gname = size, 0o444, 0, "shards", "shards"
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


_HEADER_OF_NOTHING = _slow_header("", 0)


def _counts(records: list[Record]) -> dict[str, int]:
    targets = [target for record in records for target in record.targets]
    return {
        "num_samples": len(records),
        "num_targets": len(targets),
        "num_boxes": sum(len(target.boxes_xyxy) for target in targets),
        "num_absent": sum(not target.boxes_xyxy for target in targets),
        "num_turns": sum(len(record.turns) for record in records),
    }
