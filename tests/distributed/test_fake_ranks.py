"""Single ranks of jobs that no test machine can start: whatever its data, each issues the same collectives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from ranks import run

from cogvlm_ft.shards.build import main as build

PROGRAM = Path(__file__).with_name("fake_ranks.py")
SIZES = [(56, 56), (200, 56), (56, 170), (130, 130), (50, 40)]


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return shards of photos of several sizes, each with as many targets as its number."""
    folder = tmp_path_factory.mktemp("sizes")
    rows = []
    for number, size in enumerate(SIZES, 1):
        Image.new("RGB", size, (10 * number, 90, 60)).save(folder / f"{number}.png")
        targets = [{"phrase": f"dog {each}", "boxes": [[1, 1, 9 + each, 9]]} for each in range(number)]
        rows.append({"image": f"{number}.png", "targets": targets})
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = ["--format", "jsonl", "--images", str(folder), "--annotations", str(folder / "a.jsonl")]
    assert build([*source, "--out", str(folder / "shards"), "--val-fraction", "0.8"]) == 0
    return folder / "shards"


@pytest.mark.slow
@pytest.mark.parametrize("situation", ["plain", "ema", "adapters", "tiles"])
def test_ranks_of_large_jobs_issue_the_same_collectives(
    situation: str, shards: Path, sizes: Path, start_model: Path, tmp_path: Path
) -> None:
    """Of the images to evaluate rank 0 gets one, and the last rank none; they also differ in turns and in size."""
    jobs = {32: (0, 31), 256: (0, 255)} if situation == "plain" else {32: (0, 31)}
    named = [f"{situation}:{num_ranks}:{','.join(map(str, ranks))}" for num_ranks, ranks in jobs.items()]
    images = sizes if situation == "tiles" else shards
    run([PROGRAM, start_model, images, tmp_path, *named], 1, tmp_path / "logs")
    for num_ranks, ranks in jobs.items():
        first, last = ((tmp_path / f"{situation}-{num_ranks}-{rank}.txt").read_text().splitlines() for rank in ranks)
        assert first == last
        kinds = {line.partition(" ")[0] for line in first}
        assert {"all_gather_into_tensor", "all_reduce", "gather_object"} <= kinds
        assert len(first) > 400
