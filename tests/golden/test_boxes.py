"""The box text against rows computed with the reference implementation's rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cogvlm_ft.grounding.boxes import format_boxes, parse_boxes

HERE = Path(__file__).resolve().parent
CASE_FILES = [
    path
    for path in (HERE / "cases/boxes/boxes.json", HERE.parents[2] / "shared/golden/boxes/boxes.json")
    if path.is_file()
]


@pytest.mark.parametrize("case_file", CASE_FILES, ids=["repository", "shared"][: len(CASE_FILES)])
def test_every_row_is_written_exactly(case_file: Path) -> None:
    rows = json.loads(case_file.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 34
    for row in rows:
        assert format_boxes(row["boxes"], (row["width"], row["height"])) == row["text"]


@pytest.mark.parametrize("case_file", CASE_FILES, ids=["repository", "shared"][: len(CASE_FILES)])
def test_every_row_reads_back(case_file: Path) -> None:
    for row in json.loads(case_file.read_text(encoding="utf-8"))["rows"]:
        bins = parse_boxes(row["text"])
        assert bins is not None
        assert "[[" + ";".join(",".join(f"{k:03d}" for k in item) for item in bins) + "]]" == row["text"]
