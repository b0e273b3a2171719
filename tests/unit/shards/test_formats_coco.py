"""COCO: what is no instances JSON, and what the file costs. Its bad parts are in test_bad_input.py."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from format_files import read_all, write_json

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.formats.coco import read_coco, recognise_coco
from cogvlm_ft.shards.negatives.lexicon import load_lexicon
from cogvlm_ft.shards.negatives.photo import Photo, read_photo

CONTENT: dict[str, Any] = {
    "info": {},
    "images": [{"id": 1, "file_name": "train\\a.jpg", "width": 40, "height": 30}],
    "annotations": [{"image_id": 1, "category_id": 7, "bbox": [1, 2, 20, 10], "segmentation": [[1, 2, 3, 4, 5, 6]]}],
    "categories": [{"id": 7, "name": "dog"}],
}


def test_a_path_of_windows(tmp_path: Path) -> None:
    found = read_all(read_coco, write_json(tmp_path / "x.json", CONTENT))
    assert found.boxes == {"train/a.jpg": {"dog": ((1, 2, 21, 12),)}} and not found.problems


@pytest.mark.parametrize(
    ("changes", "left", "level"),
    [
        ({"images": [{"id": 1, "file_name": "b.jpg"}]}, {}, "sample"),
        ({"categories": [{"id": 7, "name": "cat"}]}, {"train/a.jpg": {}}, "target"),
        ({"images": CONTENT["images"]}, {"train/a.jpg": {"dog": ((1, 2, 21, 12),)}}, "sample"),
    ],
)
def test_an_id_of_two_photos_or_names_gives_no_box(tmp_path: Path, changes: Any, left: Any, level: str) -> None:
    """Files were joined: an annotation could be of either, unless both entries are equal."""
    content = {name: [*CONTENT[name], *changes.get(name, [])] for name in ("images", "annotations", "categories")}
    found = read_all(read_coco, write_json(tmp_path / "x.json", content))
    assert found.boxes == left
    assert (level, "bad_field") in found.reasons and "that no other" in found.problems[0].detail


def test_photos_of_lvis_may_show_more_than_is_annotated(tmp_path: Path) -> None:
    """Only the classes listed there are surely absent: others were not looked for."""
    photo = CONTENT["images"][0] | {"neg_category_ids": [9], "not_exhaustive_category_ids": []}
    candidate = read_all(read_coco, write_json(tmp_path / "x.json", CONTENT | {"images": [photo]})).only
    assert not candidate.lists_all
    for part, is_exhaustive in ((candidate, False), (replace(candidate, lists_all=True), True)):
        photo_read = read_photo(part, [], True, load_lexicon(None))
        assert isinstance(photo_read, Photo) and photo_read.exhaustive == is_exhaustive


@pytest.mark.slow
def test_outlines_are_not_kept(tmp_path: Path) -> None:
    annotation = CONTENT["annotations"][0]
    many = [{**annotation, "segmentation": [[0.125] * 500]} for _ in range(1000)]
    path = write_json(tmp_path / "x.json", {**CONTENT, "annotations": many})
    size = path.stat().st_size
    tracemalloc.start()
    found = read_all(read_coco, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.boxes["train/a.jpg"]["dog"]) == 1000
    assert (
        peak < 2.2 * size + 2_000_000
    )  # with the outlines it is over 3: eight bytes for a number, and one object each


def test_panoptic_json_is_something_else(tmp_path: Path) -> None:
    segments = [{"image_id": 1, "file_name": "a.png", "segments_info": [{"category_id": 7, "bbox": [1, 2, 20, 10]}]}]
    path = write_json(tmp_path / "x.json", {**CONTENT, "annotations": segments})
    assert recognise_coco(path) is None
    with pytest.raises(DataError, match=r"panoptic JSON.*expected the instances JSON"):
        read_all(read_coco, path)


def test_a_folder_without_a_file(tmp_path: Path) -> None:
    assert recognise_coco(tmp_path) is None
    with pytest.raises(DataError, match=r"no COCO \.json file in it"):
        read_all(read_coco, tmp_path)


def test_values_nested_without_end(tmp_path: Path) -> None:
    deep = "[" * 500 + "]" * 500
    for name in ("bbox", "image_id", "category_id", "iscrowd"):
        annotation = json.dumps({**CONTENT["annotations"][0], name: "DEEP"}).replace('"DEEP"', deep)
        text = json.dumps({**CONTENT, "annotations": []}).replace('"annotations": []', f'"annotations": [{annotation}]')
        (tmp_path / "x.json").write_text(text)
        assert len(read_all(read_coco, tmp_path / "x.json").problems) >= 1
    text = json.dumps(CONTENT).replace('"train\\\\a.jpg"', deep)
    (tmp_path / "x.json").write_text(text)
    assert ("sample", "bad_field") in read_all(read_coco, tmp_path / "x.json").reasons


@pytest.mark.parametrize("order", [sorted(CONTENT), sorted(CONTENT, reverse=True), list(CONTENT)])
def test_recognise_a_file_of_any_size_and_order(tmp_path: Path, order: list[str]) -> None:
    large = {**CONTENT, "images": CONTENT["images"] * 3000, "annotations": CONTENT["annotations"] * 3000}
    for content in (CONTENT, large):
        path = write_json(tmp_path / "x.json", {name: content[name] for name in order})
        assert recognise_coco(path).startswith("a COCO object with ")


def test_recognise_nothing_else(tmp_path: Path) -> None:
    caption = [{**CONTENT["images"][0], "caption": "a dog", "tokens_negative": [[0, 5]]}]
    for content in (
        {},
        {"images": []},
        [CONTENT],
        {"shapes": [], "imagePath": "a.jpg"},
        {**CONTENT, "images": caption},
    ):
        assert recognise_coco(write_json(tmp_path / "x.json", content)) is None
