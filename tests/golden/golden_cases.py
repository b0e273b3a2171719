"""Finds the golden cases: a small set in this repository, and the full set where ../shared/golden exists."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open

REPOSITORY = Path(__file__).resolve().parents[2]
OWN = Path(__file__).resolve().parent / "cases"
FULL = REPOSITORY.parent / "shared" / "golden"


def root() -> Path:
    return FULL if FULL.is_dir() else OWN


def case_dirs(
    accept: Callable[[str], bool], needs: str, having: str | None = None, without: str | None = None
) -> list[Path]:
    """Return the case folders that contain the file `needs`, with the tensor `having` and not `without` in it."""
    found = []
    for path in sorted(root().iterdir()):
        if accept(path.name) and (path / needs).is_file():
            with safe_open(path / needs, framework="pt") as file:
                keys = set(file.keys())
            if (having is None or having in keys) and (without is None or without not in keys):
                found.append(path)
    return [path for path in found if (path / "config.json").is_file()]
