"""Write one shard: a tar, and next to it a JSON file with the offsets of its samples."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cogvlm_ft.data.cutting import TileCut
from cogvlm_ft.data.record import BadSampleError, Record, record_to_json
from cogvlm_ft.plain_files import open_new
from cogvlm_ft.shards.negatives.two_passes import SecondPass, add_absent_targets
from cogvlm_ft.shards.packing.candidates import Problem, Rejected
from cogvlm_ft.shards.packing.checks import CheckedSample, check_candidate, nothing_annotated
from cogvlm_ft.shards.packing.files import prefetch
from cogvlm_ft.shards.packing.shrink import shrink_sample
from cogvlm_ft.shards.packing.splits import ShardPlan
from cogvlm_ft.shards.packing.staging import StagedSample, read_staged_samples
from cogvlm_ft.shards.packing.tile_photos import cut_sample
from cogvlm_ft.shards.packing.verify import VERIFY

_NUM_AHEAD = 64
_WRITE_BUFFER = 1 << 20  # bytes


@dataclass(frozen=True)
class WriteSettings:
    """What a worker needs besides the plan of a shard. staging: path of the staging database."""

    staging: Path
    images: Path
    out: Path
    max_pixels: int
    verify: str = VERIFY[0]
    apply_exif: bool = False
    max_side: int | None = None
    negatives: SecondPass | None = None
    tiles: TileCut | None = None


def write_shard(plan: ShardPlan, settings: WriteSettings) -> int:
    """Check the candidates, write the valid ones, and return the number of candidates. Same plan, same bytes."""
    tar_path, offsets_path = shard_paths(plan.name, settings.out)
    unfinished = unfinished_path(tar_path)
    records: list[Record] = []
    rows: list[dict[str, Any]] = []
    num_added: Counter[str] = Counter()
    with open_new(unfinished, buffering=_WRITE_BUFFER) as file, _Tar(file) as tar:
        staged_samples = read_staged_samples(settings.staging, plan, with_others=settings.negatives is not None)
        for staged in _prefetched(staged_samples, settings.images):
            sample, problems = prepare_sample(staged, settings, num_added)
            rows.extend(problem_row(problem, staged.candidate.image, staged.key) for problem in problems)
            if sample:
                tar.add_sample(sample)
                records.append(sample.record)
    unfinished.replace(tar_path)
    content = {**tar.identity(), **_counts(records), "samples": tar.samples, **_by_level(rows)}
    if settings.negatives:
        content["negatives"] = dict(sorted(num_added.items()))
    write_atomically(offsets_path, to_json_bytes(content))
    return len(plan)


def _prefetched(samples: Iterable[StagedSample], images: Path) -> Iterator[StagedSample]:
    """Yield the same samples while the disk reads the images of the next ones."""
    ahead: deque[StagedSample] = deque()
    for staged in samples:
        prefetch(images, staged.candidate.image)
        ahead.append(staged)
        if len(ahead) > _NUM_AHEAD:
            yield ahead.popleft()
    yield from ahead


def prepare_sample(
    staged: StagedSample, settings: WriteSettings, num_added: Counter[str]
) -> tuple[CheckedSample | None, list[Problem]]:
    """Check a candidate, add absent targets, cut or shrink its image. num_added: the absent targets by kind."""
    candidate, key = staged.candidate, staged.key
    sample, problems = check_candidate(
        candidate,
        key,
        settings.images,
        settings.max_pixels,
        settings.verify,
        apply_exif=settings.apply_exif,
        keep_background=settings.negatives is not None,
        streams_large=settings.tiles is not None,
    )
    if sample and settings.negatives:
        sample = add_absent_targets(sample, staged, settings.staging, settings.negatives, num_added)
        if not sample.record.targets and not sample.record.turns:
            return None, [*problems, nothing_annotated(candidate).problem(candidate.source)]
    try:
        if sample and settings.tiles:
            limits = settings.images, settings.max_pixels, settings.tiles, settings.out
            sample = cut_sample(sample, candidate, *limits)
        if sample and sample.tiles is None and settings.max_side:
            sample = shrink_sample(sample, settings.max_side)
    except (BadSampleError, Rejected) as error:  # its structure is valid, but it cannot be decoded
        return None, [*problems, Problem("sample", error.reason, error.detail, candidate.source)]
    return sample, problems


def shard_paths(name: str, out: Path) -> tuple[Path, Path]:
    """Return the paths of the tar and its offsets file."""
    return out / f"{name}.tar", out / f"{name}.json"


def is_written(plan: ShardPlan, out: Path) -> bool:
    """Return whether an earlier run finished this shard and its offsets file is complete."""
    tar_path, offsets_path = shard_paths(plan.name, out)
    try:
        content = json.loads(offsets_path.read_bytes())
        return bool(content["size"] == tar_path.stat().st_size) and _is_complete(content, len(plan))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def _is_complete(content: dict[str, Any], num_candidates: int) -> bool:
    """Return whether the offsets file is consistent; raises many kinds of exception if its form differs."""
    rows, notes = content["rejected"], content.get("notes", [])  # version 0.2 had no notes
    names = problem_row(Problem("", "", "", "")).keys()
    numbers = [*(content[name] for name in _counts([])), *content.get("negatives", {}).values()]
    return (
        len(content["samples"]) == content["num_samples"]
        and content["num_samples"] + sum(row["level"] == "sample" for row in rows) == num_candidates
        and all(type(number) is int for number in numbers)
        and all(row.keys() == names and all(isinstance(text, str) for text in row.values()) for row in rows + notes)
        and re.fullmatch("[0-9a-f]{64}", content["sha256"]) is not None
    )


def problem_row(problem: Problem, image: str | None = None, key: str | None = None) -> dict[str, Any]:
    """Return a line of rejected.jsonl or notes.jsonl."""
    return {
        "level": problem.level,
        "reason": problem.reason,
        "image": image,
        "key": key,
        "source": problem.source,
        "detail": problem.detail,
    }


def _by_level(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {
        "rejected": [row for row in rows if row["level"] != "note"],
        "notes": [row for row in rows if row["level"] == "note"],
    }


def to_json_bytes(content: object) -> bytes:
    """Return compact UTF-8 JSON. Input bytes that are not valid UTF-8 become JSON escapes."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def unfinished_path(path: Path) -> Path:
    """Return the temporary path of a file being written; it contains the process id, so that two never share one."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def write_atomically(path: Path, data: bytes) -> None:
    """Write the complete file or leave the old one."""
    unfinished = unfinished_path(path)
    with open_new(unfinished) as file:
        file.write(data)
    unfinished.replace(path)


class _Tar:
    """A WebDataset tar, written by webdataset.TarWriter: the same samples give the same bytes on every machine.

    samples: their rows in the offsets file.
    """

    def __init__(self, file: IO[bytes]) -> None:
        from webdataset.writer import TarWriter  # here, because webdataset imports torch if there is one

        self._file = _Hashed(file)
        # Photos and records are bytes already, and nothing in a header may depend on the time or the machine.
        self._writer = TarWriter(self._file, encoder=False, mtime=0, user="shards", group="shards", mode=0o444)
        stream = self._writer.tarstream
        stream.fileobj, stream.copybufsize = self._file, _WRITE_BUFFER  # its own buffer copies all data several times
        self.samples: list[dict[str, Any]] = []

    def add_sample(self, sample: CheckedSample) -> None:
        """Write the members of a sample in alphabetical order, as WebDataset does."""
        key = sample.record.key
        if sample.tiles is None:
            data = {sample.ext: sample.image, "json": record_to_json(sample.record)}
            places = {ext: self._add_member(key, ext, data[ext]) for ext in sorted(data)}
        else:
            with sample.tiles as tiles:
                places = {sample.ext: self._add_parts(key, sample.ext, sample.image, tiles)}
            places["json"] = self._add_member(key, "json", record_to_json(sample.record))
        row = {"key": key, "ext": sample.ext, "image": places[sample.ext], "json": places["json"]}
        self.samples.append(row | {"num_questions": [len(sample.record.targets), len(sample.record.turns)]})

    def _add_member(self, key: str, ext: str, data: bytes) -> list[int]:
        """Write one member; return the offset and the number of its data bytes."""
        self._choose_format(key, ext)
        self._writer.write({"__key__": key, ext: data})
        return self._place(len(data))

    def _add_parts(self, key: str, ext: str, first: bytes, rest: IO[bytes]) -> list[int]:
        """Write a member of two parts, the second from a file; the header is that of `webdataset.TarWriter`."""
        info = tarfile.TarInfo(f"{key}.{ext}")
        info.size = len(first) + rest.seek(0, os.SEEK_END)
        info.mode, info.uname, info.gname = self._writer.mode, self._writer.user, self._writer.group
        rest.seek(0)
        self._choose_format(key, ext)
        self._writer.tarstream.addfile(info, _Joined(first, rest))
        return self._place(info.size)

    def _choose_format(self, key: str, ext: str) -> None:
        """Choose the older format for a short name of ASCII, whose header is the same in both and cheaper there."""
        is_plain = key.isascii() and len(key) + 1 + len(ext) <= tarfile.LENGTH_NAME
        self._writer.tarstream.format = tarfile.USTAR_FORMAT if is_plain else tarfile.PAX_FORMAT

    def _place(self, num_bytes: int) -> list[int]:
        """Return offset and size of the data that were just written."""
        stream = self._writer.tarstream
        stream.members.clear()  # they would only be needed to list the tar
        return [stream.offset - -(-num_bytes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, num_bytes]

    def __enter__(self) -> _Tar:
        return self

    def __exit__(self, *error: object) -> None:
        """Write the end of the tar; after an error too, or its last bytes would be written to a closed file."""
        self._writer.close()

    def identity(self) -> dict[str, Any]:
        """Return the hash and the number of bytes of the finished file."""
        return {"sha256": self._file.sha256.hexdigest(), "size": self._file.num_bytes}


class _Joined:
    """A file of some bytes and then the content of another file, to be read once."""

    def __init__(self, first: bytes, rest: IO[bytes]) -> None:
        self._first, self._rest = io.BytesIO(first), rest

    def read(self, num_bytes: int) -> bytes:
        data = self._first.read(num_bytes)
        return data + self._rest.read(num_bytes - len(data)) if len(data) < num_bytes else data


class _Hashed:
    """A file that is only written to, with the hash and the number of bytes written so far."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)

    def close(self) -> None:
        """Leave the file open: it belongs to the caller."""


def _counts(records: list[Record]) -> dict[str, int]:
    targets = [target for record in records for target in record.targets]
    return {
        "num_samples": len(records),
        "num_targets": len(targets),
        "num_boxes": sum(len(target.boxes_xyxy) for target in targets),
        "num_absent": sum(not target.boxes_xyxy for target in targets),
        "num_turns": sum(len(record.turns) for record in records),
    }
