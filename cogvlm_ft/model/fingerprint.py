"""Identify the weights of a result, without reading tens of gigabytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

ENDINGS = (".safetensors", ".json", ".model", ".pt")
BLOCK_BYTES, NUM_BLOCKS = 2**16, 64


def fingerprint(folder: Path, pattern: str = "**/*") -> str:
    """Hash a model folder or a training checkpoint (sha256): names, sizes, and blocks spread over every file.

    pattern: of the files that count.

    Training changes the whole of a file, so a part of it distinguishes two runs. Corruption may go unnoticed.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.glob(pattern) if path.suffix in ENDINGS and path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            for start in _block_starts(size):
                file.seek(start)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def _block_starts(size: int) -> list[int]:
    """List the first and last block and those between; of a small file, all blocks."""
    if size <= BLOCK_BYTES * NUM_BLOCKS:
        return list(range(0, size, BLOCK_BYTES))
    return [(size - BLOCK_BYTES) * i // (NUM_BLOCKS - 1) for i in range(NUM_BLOCKS)]
