from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cogvlm_ft.shards.demo_scenes import COLOURS, KINDS, main, write_scenes

SIZE_PX = 56
Scenes = list[tuple[np.ndarray, list[dict[str, Any]]]]
CHINESE_COLOURS = {chinese: rgb for chinese, rgb in COLOURS.values()}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    folder = tmp_path_factory.mktemp("scenes")
    lines = write_scenes(folder, 300, SIZE_PX, seed=0).read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return [(np.asarray(Image.open(folder / entry["image"])), entry["targets"]) for entry in entries]


def colour_of(target: dict[str, Any]) -> tuple[int, int, int]:
    if target["language"] == "en":
        return COLOURS[target["phrase"].split()[1]][1]
    return next(rgb for chinese, rgb in CHINESE_COLOURS.items() if target["phrase"].startswith(chinese))


def test_every_scene_asks_four_different_things(scenes: Scenes) -> None:
    for image, targets in scenes:
        assert image.shape == (SIZE_PX, SIZE_PX, 3)
        assert len({target["phrase"] for target in targets}) == 4


def test_the_mix_of_questions(scenes: Scenes) -> None:
    targets = [target for _, targets in scenes for target in targets]
    per_scene = {
        "absent": sum(not target["boxes"] for target in targets) / len(scenes),
        "twins": sum(len(target["boxes"]) == 2 for target in targets) / len(scenes),
        "chinese": sum(target["language"] == "zh" for target in targets) / len(scenes),
    }
    assert 1.4 < per_scene["absent"] < 1.9
    assert 0.15 < per_scene["twins"] < 0.35
    assert 1.8 < per_scene["chinese"] < 2.2
    assert all(len(target["boxes"]) <= 2 for target in targets)


def test_boxes_are_the_extents_of_the_coloured_pixels(scenes: Scenes) -> None:
    for image, targets in scenes:
        for target in targets:
            mask = (image == colour_of(target)).all(axis=-1)
            for x0, y0, x1, y1 in target["boxes"]:
                inside = mask[y0:y1, x0:x1]
                assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
                # One pixel further out there is nothing of this shape: shapes keep a free pixel around them.
                grown = mask[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1]
                assert grown.sum() == inside.sum()


def test_sizes_are_varied_and_within_bounds(scenes: Scenes) -> None:
    sides = [x1 - x0 for _, targets in scenes for target in targets for x0, _, x1, _ in target["boxes"]]
    assert 0.34 * SIZE_PX <= min(sides) < 0.40 * SIZE_PX
    assert 0.46 * SIZE_PX < max(sides) <= 0.50 * SIZE_PX


def test_every_coloured_pixel_belongs_to_a_true_box(scenes: Scenes) -> None:
    """So a target without boxes is really not in the picture."""
    for image, targets in scenes:
        for rgb in CHINESE_COLOURS.values():
            mask = (image == rgb).all(axis=-1)
            for target in targets:
                if colour_of(target) == rgb:
                    for x0, y0, x1, y1 in target["boxes"]:
                        mask[y0:y1, x0:x1] = False
            assert not mask.any()


def test_many_absent_things_have_a_colour_that_is_there(scenes: Scenes) -> None:
    absent, hard = 0, 0
    for _, targets in scenes:
        seen = {colour_of(target) for target in targets if target["boxes"]}
        for target in targets:
            if not target["boxes"]:
                absent += 1
                hard += colour_of(target) in seen
    assert 0.4 < hard / absent < 0.8


def test_all_colours_and_kinds_occur(scenes: Scenes) -> None:
    phrases = {target["phrase"] for _, targets in scenes for target in targets}
    assert {f"the {colour} {kind}" for colour in COLOURS for kind in KINDS} <= phrases
    assert {f"{chinese}{kind}" for chinese in CHINESE_COLOURS for kind in KINDS.values()} <= phrases


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        main(["--out", str(tmp_path / name), "--num-scenes", "3", "--image-size", "40", "--seed", str(seed)])
    assert read_all(tmp_path / "a") == read_all(tmp_path / "b") != read_all(tmp_path / "c")
    assert len(read_all(tmp_path / "a")) == 4


def test_scenes_from_a_later_start_are_the_same_scenes(tmp_path: Path) -> None:
    write_scenes(tmp_path / "all", 4, SIZE_PX, seed=0)
    write_scenes(tmp_path / "late", 2, SIZE_PX, seed=0, start=2)
    everything, late = read_all(tmp_path / "all"), read_all(tmp_path / "late")
    assert late["scene-000003.png"] == everything["scene-000003.png"]
    assert everything["annotations.jsonl"].endswith(late["annotations.jsonl"])


def test_a_picture_too_small_for_shapes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--num-scenes", "1", "--image-size", "8"])
    assert "at least 24 px" in capsys.readouterr().err
