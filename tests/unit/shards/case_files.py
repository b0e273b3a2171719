"""The cases in tests/cases: what a user has, and what a build makes of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.build import main

CASES = Path(__file__).parents[2] / "cases"


@dataclass
class Built:
    """Boxes by file name of the photo without ending, and phrase; the rows of rejected.jsonl and notes.jsonl."""

    code: int
    printed: str
    boxes: dict[str, dict[str, tuple[Box, ...]]] = field(default_factory=dict)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def reasons(self) -> list[str]:
        return [row["reason"] for row in self.rejected]

    @property
    def noted(self) -> list[str]:
        return [row["reason"] for row in self.notes]


def build_case(annotations: Path, out: Path, capsys: Any, *options: str) -> Built:
    """Build as a user does: --annotations alone, and these options."""
    arguments = ["--annotations", str(annotations), "--out", str(out), "--workers", "1", "--val-fraction", "0"]
    code = main([*arguments, *options])
    printed = "".join(capsys.readouterr())
    if code:
        return Built(code, printed)
    reader = ShardReader(load_index(str(out), "train"))
    records = [reader.read(i).record for i in range(len(reader))]
    reader.close()
    boxes = {record.key: {target.phrase: rounded(target.boxes_xyxy) for target in record.targets} for record in records}
    assert all(len(boxes[record.key]) == len(record.targets) for record in records)
    return Built(code, printed, boxes, *(_rows(out / name) for name in ("rejected.jsonl", "notes.jsonl")))


def rounded(boxes: tuple[Box, ...]) -> tuple[Box, ...]:
    """To a millionth of a pixel."""
    return tuple(tuple(round(side, 6) for side in box) for box in boxes)  # type: ignore[misc]


def write_photo(path: Path, size: tuple[int, int] = (100, 80), seed: int = 0) -> Path:
    """A small photo that no other seed has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]
