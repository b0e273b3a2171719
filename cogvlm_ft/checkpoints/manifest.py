"""The files of a checkpoint and their hashes, which show whether it is intact.

    manifest.json    {"files": {"state.json": {"num_bytes": 312, "sha256": "9f..."}, ...}, "sha256": of all these}

Hashes detect faults of disks, networks and killed programs, not deliberate changes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from cogvlm_ft.checkpoints.reading import is_wrong_part, read_again, stop_if_unreadable
from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.plain_files import read_json
from cogvlm_ft.runtime.distributed import from_main, gather_to_main, is_main, rank, world_size
from cogvlm_ft.runtime.watchdog import progress
from cogvlm_ft.safetensors_io import FileRecord, read_chunks
from cogvlm_ft.terminal import progress_bar

MANIFEST_FILE = "manifest.json"


def write_manifest(checkpoint: Path, files: Mapping[str, FileRecord]) -> None:
    """Write the manifest. `files` by their path in the checkpoint, with forward slashes."""
    records = {name: dataclasses.asdict(files[name]) for name in sorted(files)}
    text = json.dumps({"files": records, "sha256": _own_hash(records)}, indent=1)
    (checkpoint / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def read_manifest(checkpoint: Path) -> dict[str, FileRecord]:
    """Read the manifest; CheckpointError if there is none, or it is not as it was written.

    Raises OSError if the disk or the server does not answer.
    """
    path = checkpoint / MANIFEST_FILE
    try:
        manifest = read_again(lambda: read_json(path))
        records, found = manifest["files"], manifest["sha256"]
        files = {name: _checked(name, FileRecord(**record)) for name, record in records.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {checkpoint} is not a complete checkpoint") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}") from error
    if found != _own_hash(records):
        raise CheckpointError(f"{path} was changed: its own hash does not fit it")
    outside = [name for name in files if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if outside:
        raise CheckpointError(f"{path} names files outside its folder: {outside}")
    return files


def _checked(name: str, record: FileRecord) -> FileRecord:
    """Return the record; ValueError if its name cannot be that of a file, or its values are of other types."""
    if "\0" in name or not os.fsencode(name) or type(record.num_bytes) is not int or type(record.sha256) is not str:
        raise ValueError(name)
    return record


def find_damage(checkpoint: Path) -> list[str]:
    """Return what is wrong with the checkpoint's files, nothing if it is intact. Collective.

    The ranks share the reading. Raises OSError on all of them if one could not read: that says nothing about the files.
    """
    problems, unreadable = [], ""
    try:
        files = read_manifest(checkpoint)
        problems = _differences(checkpoint, files, sorted(files)[rank() :: world_size()])
    except CheckpointError as error:
        problems = [str(error)]
    except OSError as error:
        if is_wrong_part(error):
            problems = [str(error)]
        else:
            unreadable = f"rank {rank()}: {error}"
    stop_if_unreadable(checkpoint, unreadable)
    found = gather_to_main(problems)
    return from_main(sorted({problem for part in found for problem in part}) if found is not None else None)


def has_all_files(checkpoint: Path) -> bool:
    """Return whether all files of the checkpoint have the size with which they were written."""
    files = read_manifest(checkpoint)
    return all((checkpoint / name).stat().st_size == record.num_bytes for name, record in files.items())


def _differences(checkpoint: Path, files: Mapping[str, FileRecord], names: list[str]) -> list[str]:
    problems = []
    total = sum(files[name].num_bytes for name in names)
    with progress_bar(desc=f"check {checkpoint.name}", unit="B", total=total, is_shown=is_main()) as bar:
        for name in names:
            problem = _difference(checkpoint / name, files[name])
            problems += [f"{name} {problem}"] if problem else []
            bar.update(files[name].num_bytes)
    return problems


def _difference(path: Path, expected: FileRecord) -> str:
    try:
        found_bytes = read_again(path.stat).st_size
        if found_bytes != expected.num_bytes:
            return f"has {found_bytes} bytes, expected {expected.num_bytes}"
        found = read_again(lambda: _sha256(path))
        return "" if found == expected.sha256 else "is not what was written: its sha256 differs"
    except OSError as error:
        if not is_wrong_part(error):
            raise
        return f"cannot be read: {error.strerror}"


def _sha256(path: Path) -> str:
    """Hash a file and report progress: a slow disk is not a hang."""
    digest = hashlib.sha256()
    for chunk in read_chunks(path):
        progress()
        digest.update(chunk)
    return digest.hexdigest()


def _own_hash(records: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()
