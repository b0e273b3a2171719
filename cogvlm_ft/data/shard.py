"""One tar as an index sees it: where its samples are, from its offsets file or by a scan."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cogvlm_ft.data.kept_scans import kept_scan, state_of_file
from cogvlm_ft.data.remote import RemoteShard
from cogvlm_ft.data.tars import (
    IMAGE_EXTENSIONS,
    MAX_KEY_BYTES,
    MAX_MEMBER_BYTES,
    MAX_RECORD_BYTES,
    Entry,
    Loss,
    Scan,
    scan_tar,
)
from cogvlm_ft.data.versions import note_indexed
from cogvlm_ft.data.whole_files import Cache
from cogvlm_ft.plain_files import real_path

_UNKNOWN = (-1, -1)

_log = logging.getLogger(__name__)


class Shard(NamedTuple):
    """Samples of one tar.

    places: int64[samples, 4], the numbers of an Entry. questions: int32[samples, 2], num_targets and num_turns.
    """

    path: Path | RemoteShard
    keys: NDArray[np.bytes_]
    exts: NDArray[np.bytes_]
    places: NDArray[np.int64]
    questions: NDArray[np.int32]
    losses: list[Loss]
    notes: list[Loss]
    identity: str


def load_shard(path: Path, cache: Cache | None = None) -> Shard:
    """Load a local tar by its offsets file if that matches, else by a scan, whose result is kept in the cache."""
    status = path.stat()
    note_indexed(path, status)
    size = status.st_size
    offsets_path = path.with_suffix(".json")
    if offsets_path.is_file():
        try:
            return shard_of_offsets(json.loads(offsets_path.read_bytes()), path, size)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            _log.warning("%s does not match %s (%s); scanning the tar instead", offsets_path.name, path, error)
    scan = kept_scan(cache, str(real_path(path)), state_of_file(status), lambda: scan_tar(path))
    return shard_of_scan(path, scan, size)


def shard_of_scan(path: Path | RemoteShard, scan: Scan, size: int) -> Shard:
    """Build a shard of `size` bytes from what a scan of it found."""
    layout = hashlib.sha256(repr(scan.entries).encode("utf-8", "backslashreplace")).hexdigest()
    shard = _shard_of_entries(path, scan.entries, [_UNKNOWN] * len(scan.entries), f"{size}:{layout}")
    return shard._replace(losses=scan.losses, notes=scan.notes)


def shard_of_offsets(content: Any, path: Path | RemoteShard, size: int) -> Shard:
    """Build a shard from its offsets file.

    Raises ValueError, KeyError or TypeError if it does not describe a tar of `size` bytes, sample by sample.
    """
    if content["size"] != size:
        raise ValueError(f"found offsets for {content['size']} bytes; expected {size}, the size of the tar")
    sha256 = str(content["sha256"])
    if isinstance(path, RemoteShard) and sha256 != path.sha256:
        raise ValueError(f"found sha256 {sha256:.64}; expected {path.sha256}, as in index.json")
    entries = [Entry(row["key"], row["ext"], *row["image"], *row["json"]) for row in content["samples"]]
    if len(entries) != content["num_samples"]:
        raise ValueError(f"num_samples: found {content['num_samples']}; expected {len(entries)}")
    for i, entry in enumerate(entries):
        good = isinstance(entry.key, str) and entry.ext in IMAGE_EXTENSIONS
        if not good or any(type(number) is not int for number in entry[2:]):
            raise ValueError(f"samples[{i}]: expected a key, an extension and four whole numbers")
        num_bytes = len(entry.key.encode("utf-8", "backslashreplace"))
        if num_bytes > MAX_KEY_BYTES:
            raise ValueError(f"samples[{i}]: found a key of {num_bytes} bytes; expected at most {MAX_KEY_BYTES}")
        if (
            min(entry[2:]) < 0
            or max(entry.image_offset + entry.image_num_bytes, entry.json_offset + entry.json_num_bytes) > size
        ):
            raise ValueError(f"sample {entry.key!r} is outside the tar")
        if entry.image_num_bytes > MAX_MEMBER_BYTES or entry.json_num_bytes > MAX_RECORD_BYTES:
            limits = f"{MAX_MEMBER_BYTES} bytes of an image and {MAX_RECORD_BYTES} of a record"
            raise ValueError(f"sample {entry.key!r}: expected at most {limits}")
    questions = [_num_questions(row, i) for i, row in enumerate(content["samples"])]
    return _shard_of_entries(path, entries, questions, sha256)


def _num_questions(row: dict[str, Any], i: int) -> tuple[int, int]:
    """Return (num_targets, num_turns) of a sample; older offsets files do not have them."""
    if "num_questions" not in row:
        return _UNKNOWN
    num_targets, num_turns = row["num_questions"]
    if not all(type(number) is int and 0 <= number <= MAX_MEMBER_BYTES for number in (num_targets, num_turns)):
        raise ValueError(f"samples[{i}].num_questions: found {row['num_questions']!r:.80}; expected two whole numbers")
    return num_targets, num_turns


def _shard_of_entries(
    path: Path | RemoteShard, entries: list[Entry], questions: list[tuple[int, int]], identity: str
) -> Shard:
    """Store entries as arrays, which take a tenth of the memory for a million entries."""
    return Shard(
        path,
        keys=np.array([entry.key.encode("utf-8", "backslashreplace") for entry in entries], dtype=np.bytes_),
        exts=np.array([entry.ext.encode() for entry in entries], dtype=np.bytes_),
        places=np.array([entry[2:] for entry in entries], dtype=np.int64).reshape(-1, 4),
        questions=np.array(questions, dtype=np.int32).reshape(-1, 2),
        losses=[],
        notes=[],
        identity=identity,
    )
