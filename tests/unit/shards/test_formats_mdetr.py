"""MDETR's finetuning JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from format_files import Reading, read_all, write_json

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.formats.mdetr import read_mdetr, recognise_mdetr

PHOTO = "COCO_train2014_000000581857.jpg"
CONTENT: dict[str, Any] = {
    "info": [],
    "licenses": [],
    "images": [
        {
            "file_name": PHOTO,
            "height": 427,
            "width": 640,
            "id": 0,
            "original_id": 581857,
            "caption": "the lady with the blue shirt",
            "dataset_name": "refcoco",
            "tokens_negative": [[0, 28]],
        },
        {"file_name": PHOTO, "height": 427, "width": 640, "id": 1, "caption": "man", "tokens_negative": [[0, 3]]},
        {"file_name": "b.jpg", "id": 2, "caption": "两只猫"},
    ],
    "annotations": [
        {"id": 0, "image_id": 0, "bbox": [103.93, 299.99, 134.22, 177.42], "tokens_positive": [[0, 28]], "iscrowd": 0},
        {"id": 1, "image_id": 1, "bbox": [0, 1, 100, 200], "tokens_positive": [[0, 3]], "iscrowd": 0},
        {"id": 2, "image_id": 2, "bbox": [0, 0, 5, 5]},
        {"id": 3, "image_id": 2, "bbox": [5, 5, 5, 5]},
    ],
    "categories": [{"supercategory": "object", "id": 1, "name": "object"}],
}


def read(tmp_path: Path, **changes: Any) -> Reading:
    content = {name: [*CONTENT[name], *more] for name, more in changes.items()}
    return read_all(read_mdetr, write_json(tmp_path / "finetune_refcoco_train.json", {**CONTENT, **content}))


def test_a_caption_names_its_boxes(tmp_path: Path) -> None:
    found = read(tmp_path)
    assert not found.problems
    assert found.boxes == {
        PHOTO: {
            "the lady with the blue shirt": ((103.93, 299.99, 103.93 + 134.22, 299.99 + 177.42),),
            "man": ((0, 1, 100, 201),),
        },
        "b.jpg": {"两只猫": ((0, 0, 5, 5), (5, 5, 10, 10))},
    }
    assert [candidate.stated_size_px for candidate in found.candidates] == [(640, 427), None]
    assert found.candidates[1].targets[0].language == "zh"


def test_boxes_of_different_words_become_targets_of_their_own(tmp_path: Path) -> None:
    """As in Flickr30k Entities: the caption as a whole would be wrong for each box."""
    image = {"id": 9, "file_name": "f.jpg", "caption": "A man and a dog , a man"}
    spans = [[[0, 5]], [[10, 15]], [[18, 23]], [[0, 5]]]
    boxes = [[i, i, 5, 5] for i in range(4)]
    pairs = zip(boxes, spans, strict=True)
    annotations = [{"image_id": 9, "bbox": box, "tokens_positive": span} for box, span in pairs]
    found = read(tmp_path, images=[image], annotations=annotations)
    assert found.boxes["f.jpg"] == {
        "A man": ((0, 0, 5, 5), (3, 3, 8, 8)),
        "a dog": ((1, 1, 6, 6),),
        "a man": ((2, 2, 7, 7),),
    }


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        ({"image_id": 9, "bbox": [1, 1, 1, 1]}, ("box", "unknown_image_id")),
        ({"image_id": [0], "bbox": [1, 1, 1, 1]}, ("box", "unknown_image_id")),
        ({"image_id": 2, "bbox": [1, 1, 1]}, ("box", "wrong_number_of_coordinates")),
        ({"image_id": 2, "bbox": ["1", 1, 1, 1]}, ("box", "not_numeric")),
        ({"image_id": 2}, ("box", "bad_field")),
        ({"image_id": 2, "bbox": [1, 1, 1, 1], "tokens_positive": [[3, 1]]}, ("box", "bad_field")),
        ({"image_id": 2, "bbox": [1, 1, 1, 1], "tokens_positive": "all"}, ("box", "bad_field")),
        ("none", ("box", "bad_field")),
    ],
)
def test_a_bad_annotation_is_lost_alone(tmp_path: Path, annotation: Any, expected: tuple[str, str]) -> None:
    found = read(tmp_path, annotations=[annotation])
    assert found.reasons == [expected]
    assert found.boxes["b.jpg"] == {"两只猫": ((0, 0, 5, 5), (5, 5, 10, 10))}
    assert found.problems[0].source == "annotations[4]"


def test_a_caption_that_lost_all_its_boxes_is_not_called_absent(tmp_path: Path) -> None:
    image = {"id": 9, "file_name": "f.jpg", "caption": "dog"}
    found = read(tmp_path, images=[image], annotations=[{"image_id": 9, "bbox": []}])
    assert found.reasons == [("box", "wrong_number_of_coordinates"), ("target", "no_boxes_left")]
    assert found.boxes["f.jpg"] == {}


def test_a_caption_without_any_box_is_reported(tmp_path: Path) -> None:
    found = read(tmp_path, images=[{"id": 9, "file_name": PHOTO, "caption": "the sky"}])
    assert found.reasons == [("target", "no_boxes")] and "the sky" in found.problems[0].detail
    assert list(found.boxes[PHOTO]) == ["the lady with the blue shirt", "man"]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ({"id": 9, "file_name": "c.jpg"}, "bad_field"),
        ({"id": 9, "caption": "c"}, "bad_field"),
        ({"id": 2, "file_name": "c.jpg", "caption": "c"}, "bad_field"),
        ({"id": None, "file_name": "c.jpg", "caption": "c"}, "bad_field"),
        ({"id": 9, "file_name": "\ud800.jpg", "caption": "c"}, "not_utf8"),
        ("c.jpg", "bad_field"),
    ],
)
def test_a_bad_image_is_lost_with_its_boxes(tmp_path: Path, image: Any, reason: str) -> None:
    boxes = [{"image_id": 9, "bbox": [1, 1, 1, 1]}] if isinstance(image, dict) and image.get("id") == 9 else []
    found = read(tmp_path, images=[image], annotations=boxes)
    assert found.reasons == [("sample", reason)] and len(found.candidates) == 2


def test_a_caption_made_for_another_size_is_a_contradiction(tmp_path: Path) -> None:
    image = {"id": 9, "file_name": PHOTO, "caption": "cup", "width": 427, "height": 640}
    found = read(tmp_path, images=[image], annotations=[{"image_id": 9, "bbox": [1, 1, 1, 1]}])
    assert found.reasons == [("target", "contradiction")] and "(427, 640)" in found.problems[0].detail
    assert list(found.boxes[PHOTO]) == ["the lady with the blue shirt", "man"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "found a list"),
        (b'{"images": {}}', 'has no lists "images" and "annotations"; found images'),
    ],
)
def test_something_else_is_a_data_error(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_all(read_mdetr, path)


def test_recognise(tmp_path: Path) -> None:
    path = write_json(tmp_path / "x.json", CONTENT)
    assert recognise_mdetr(path) == 'a JSON object with captions and "tokens_positive"'
    path.write_text(json.dumps({"info": "x" * 200_000, **CONTENT}))
    assert recognise_mdetr(path)
    coco = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"bbox": [1, 2, 3, 4]}], "categories": []}
    assert recognise_mdetr(write_json(path, coco)) is None
    assert recognise_mdetr(tmp_path) is None
