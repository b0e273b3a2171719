"""Small photos, and builds of them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def run_build(name: str, annotations: Path, images: Path, out: Path, **settings: Any) -> dict[str, Any]:
    """Every record by key as WebDataset reads it, the rejected rows, the notes, and index.json."""
    build(BuildSettings(name, images, annotations, **{"val_fraction": 0.0, **settings}), out, num_workers=1)
    urls = [str(path) for path in sorted(out.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    return {
        "records": {sample["__key__"]: json.loads(sample["json"]) for sample in samples},
        "rejected": [json.loads(line) for line in (out / "rejected.jsonl").read_bytes().splitlines()],
        "notes": [json.loads(line) for line in (out / "notes.jsonl").read_bytes().splitlines()],
        "index": json.loads((out / "index.json").read_bytes()),
    }
