"""ZeRO-3 on 1, 2 and 3 ranks: loading, generation and scores do not depend on the number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import run

from cogvlm_ft.data.index import load_index

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("zero3_rules.py")


@pytest.fixture(scope="module")
def outputs(shards: Path, start_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return evaluation folders by world size; of 9 images 2 ranks get 5 and 4, with answers of different lengths."""
    folder = tmp_path_factory.mktemp("zero3")
    for world_size in (1, 2, 3):
        out = folder / str(world_size)
        text = run([PROGRAM, start_model, shards, out], world_size, folder / "logs")
        reported = [json.loads(line)["metrics"] for line in text.splitlines() if line.startswith('{"rank"')]
        assert len(reported) == world_size
        assert all(metrics == reported[0] for metrics in reported)  # every rank knows the same numbers
    return {world_size: folder / str(world_size) for world_size in (1, 2, 3)}


@pytest.mark.parametrize("world_size", [2, 3])
def test_scores_do_not_depend_on_the_number_of_ranks(outputs: dict[int, Path], world_size: int) -> None:
    for name in ("metrics.json", "predictions.jsonl", "tiles/metrics.json", "tiles/predictions.jsonl"):
        assert (outputs[world_size] / name).read_text() == (outputs[1] / name).read_text(), name
    merged = json.loads((outputs[1] / "tiles" / "metrics.json").read_text())
    assert merged["num_images"] == 5 and "tile_duplicates" in merged


def test_every_image_is_answered_once(outputs: dict[int, Path], shards: Path) -> None:
    index = load_index(shards, "val")
    rows = [json.loads(line) for line in (outputs[2] / "predictions.jsonl").read_text().splitlines()]
    seen = [(row["key"], row["turn"]) for row in rows]
    assert len(seen) == len(set(seen))
    assert list(dict.fromkeys(key for key, _ in seen)) == [index.key(i) for i in range(len(index))]
    assert json.loads((outputs[2] / "metrics.json").read_text())["num_images"] == len(index)
