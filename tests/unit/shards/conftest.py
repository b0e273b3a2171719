"""Photo folders, and builds from a few lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from photo_builds import Build, image_bytes, run_build


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five photos of 40x30 pixels: a.jpg ... e.jpg."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed, name in enumerate("abcde"):
        (folder / f"{name}.jpg").write_bytes(image_bytes(seed=seed))
    return folder


@pytest.fixture
def build_jsonl(photos: Path, tmp_path: Path) -> Build:
    """Builds from lines (objects or raw bytes); returns every record by key, the rejected rows and the index."""

    def run(lines: list[Any], **settings: Any) -> dict[str, Any]:
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        annotations = tmp_path / "lines.jsonl"
        annotations.write_bytes(b"\n".join(raw))
        return run_build("jsonl", annotations, photos, tmp_path / "out", **settings)

    return run


@pytest.fixture
def build_coco(photos: Path, tmp_path: Path) -> Build:
    """Builds from a COCO object; returns the same as `build_jsonl`."""

    def run(content: Any, **settings: Any) -> dict[str, Any]:
        annotations = tmp_path / "instances.json"
        annotations.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return run_build("coco", annotations, photos, tmp_path / "out", **settings)

    return run
