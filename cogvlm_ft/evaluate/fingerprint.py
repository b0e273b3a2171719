"""Which weights a result belongs to, without reading tens of gigabytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

ENDINGS = (".safetensors", ".json", ".model", ".pt")
BLOCK_BYTES, NUM_BLOCKS = 2**16, 64


def fingerprint(folder: Path) -> str:
    """sha256 of a model folder or a training checkpoint: names, sizes, and blocks spread over every file.

    Training changes all of a file, so a part of it tells two trainings apart. It is no proof against damage.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in ENDINGS and path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            for start in _block_starts(size):
                file.seek(start)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def _block_starts(size: int) -> list[int]:
    """First and last block and those between; of a small file, all of it."""
    if size <= BLOCK_BYTES * NUM_BLOCKS:
        return list(range(0, size, BLOCK_BYTES))
    return [(size - BLOCK_BYTES) * i // (NUM_BLOCKS - 1) for i in range(NUM_BLOCKS)]
