"""Small photos, and builds of them."""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import webdataset
from PIL import Image

from cogvlm_ft.shards.build import BuildSettings, build

Build = Callable[..., dict[str, Any]]


def image_bytes(width: int = 40, height: int = 30, seed: int = 0, image_format: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


def read_by_workers(out: Path) -> list[dict[str, Any]]:
    """Every sample of the shards in a folder, as WebDataset reads them on two nodes with two workers each.

    Every sample must come once.
    """
    urls = [str(path) for path in sorted(out.glob("*.tar"))]
    samples: list[dict[str, Any]] = []
    for node, worker in itertools.product("01", repeat=2):
        place = {"RANK": node, "WORLD_SIZE": "2", "WORKER": worker, "NUM_WORKERS": "2"}
        with mock.patch.dict(os.environ, place):
            samples += webdataset.WebDataset(
                urls, shardshuffle=False, nodesplitter=webdataset.split_by_node, empty_check=False
            )
    listed = [row["key"] for path in out.glob("*-*.json") for row in json.loads(path.read_bytes())["samples"]]
    assert sorted(sample["__key__"] for sample in samples) == sorted(listed)
    assert len(set(listed)) == len(listed)
    return samples


def run_build(name: str, annotations: Path, images: Path, out: Path, **settings: Any) -> dict[str, Any]:
    """Every record by key as WebDataset reads it, the rejected rows, the notes, and index.json."""
    build(BuildSettings(name, images, annotations, **{"val_fraction": 0.0, **settings}), out, num_workers=1)
    samples = read_by_workers(out)
    return {
        "records": {sample["__key__"]: json.loads(sample["json"]) for sample in samples},
        "rejected": [json.loads(line) for line in (out / "rejected.jsonl").read_bytes().splitlines()],
        "notes": [json.loads(line) for line in (out / "notes.jsonl").read_bytes().splitlines()],
        "index": json.loads((out / "index.json").read_bytes()),
    }
