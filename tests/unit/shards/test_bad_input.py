"""Every kind of bad input is reported with its reason, and nothing else is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from photo_builds import Build, image_bytes

from cogvlm_ft.errors import DataError

GOOD = {"image": "b.jpg", "targets": [{"phrase": "cat", "boxes": [[0, 0, 40, 30]]}]}
GOOD_RECORD = {"phrase": "cat", "language": "en", "boxes_xyxy": [[0, 0, 40, 30]], "description": None}


def with_boxes(*boxes: Any) -> dict[str, Any]:
    return {"image": "a.jpg", "targets": [{"phrase": "dog", "boxes": list(boxes)}]}


def reasons(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [(row["level"], row["reason"]) for row in found["rejected"]]


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([0, 0, 42, 30], "box_outside_image"),
        ([-1.5, 0, 10, 10], "box_outside_image"),
        ([0, 0, 10, 31.5], "box_outside_image"),
        ([100, 100, 120, 120], "box_outside_image"),
        ([10, 5, 10, 20], "zero_area"),
        ([10, 5, 20, 5], "zero_area"),
        ([-0.5, 5, 0, 20], "zero_area"),
        ([20, 5, 10, 20], "inverted_box"),
        ([10, 20, 20, 5], "inverted_box"),
        ([float("nan"), 0, 10, 10], "not_finite"),
        ([0, 0, float("inf"), 10], "not_finite"),
        ([0, 0, 10**400, 10], "not_finite"),
        (["0", 0, 10, 10], "not_numeric"),
        ([None, 0, 10, 10], "not_numeric"),
        ([True, 0, 10, 10], "not_numeric"),
        ([0, 0, 10], "wrong_number_of_coordinates"),
        ([0, 0, 10, 10, 0.9], "wrong_number_of_coordinates"),
        ([], "wrong_number_of_coordinates"),
        ("0 0 10 10", "bad_field"),
        (7, "bad_field"),
    ],
)
def test_a_bad_box_is_lost_alone(build_jsonl: Build, box: Any, reason: str) -> None:
    found = build_jsonl([with_boxes([1, 2, 20, 15], box, [5, 5, 6, 6]), GOOD])
    assert reasons(found) == [("box", reason)]
    row = found["rejected"][0]
    assert (row["image"], row["key"]) == ("a.jpg", "a") and "lines.jsonl:1" in row["source"] and row["detail"]
    assert found["records"]["a"]["targets"][0]["boxes_xyxy"] == [[1, 2, 20, 15], [5, 5, 6, 6]]
    assert found["records"]["b"]["targets"] == [GOOD_RECORD]
    assert found["index"]["rejected"] == {reason: 1}


def test_a_box_that_leaves_by_a_rounding_error_is_clipped(build_jsonl: Build) -> None:
    found = build_jsonl([with_boxes([-1, -0.5, 41, 30.9])])
    assert found["records"]["a"]["targets"][0]["boxes_xyxy"] == [[0, 0, 40, 30]] and not found["rejected"]


@pytest.mark.parametrize("box", [[0, 0, 99, 99], [0, 0, float("nan"), 9]])
def test_a_target_never_becomes_absent_by_losing_its_boxes(build_jsonl: Build, box: list[float]) -> None:
    line = with_boxes(box)
    line["targets"].append({"phrase": "cat", "boxes": [[1, 1, 2, 2]]})
    found = build_jsonl([line])
    assert [level for level, _ in reasons(found)] == ["box", "target"]
    assert reasons(found)[1][1] == "no_boxes_left"
    assert [target["phrase"] for target in found["records"]["a"]["targets"]] == ["cat"]
    assert found["index"]["splits"]["train"]["num_absent"] == 0


@pytest.mark.parametrize("box", [[0, 0, 99, 99], [0, 0, float("nan"), 9]])
def test_a_sample_without_targets_left_is_dropped_unless_it_has_turns(build_jsonl: Build, box: list[float]) -> None:
    lines = [with_boxes(box), {**with_boxes(box), "image": "c.jpg", "turns": [{"prompt": "p", "answer": "q"}]}, GOOD]
    found = build_jsonl(lines)
    assert set(found["records"]) == {"b", "c"} and found["records"]["c"]["targets"] == []
    rows = [row["reason"] for row in found["rejected"] if row["image"] == "a.jpg"]
    assert rows[1:] == ["no_boxes_left", "no_targets_left"]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("gone.jpg", "missing_image"),
        ("folder.jpg", "missing_image"),
        ("a.jpg/x.jpg", "missing_image"),
        ("truncated.jpg", "broken_image"),
        ("text.jpg", "broken_image"),
        ("empty.png", "broken_image"),
        ("postscript.jpg", "broken_image"),
        ("large.png", "too_many_pixels"),
        ("../outside.jpg", "path_outside_images"),
        ("sub/../../outside.jpg", "path_outside_images"),
        ("link.jpg", "path_outside_images"),
        ("notes.txt", "unsupported_extension"),
        ("noext", "unsupported_extension"),
        ("nul\0.jpg", "unreadable_image"),
        ("circle.jpg", "unreadable_image"),
        ("", "bad_field"),
        (None, "bad_field"),
    ],
)
def test_bad_images(build_jsonl: Build, photos: Path, image: Any, reason: str) -> None:
    (photos.parent / "outside.jpg").write_bytes(image_bytes())
    (photos / "folder.jpg").mkdir()
    (photos / "truncated.jpg").write_bytes((photos / "a.jpg").read_bytes()[:-200])
    (photos / "text.jpg").write_bytes(b"<html>404</html>")
    (photos / "empty.png").write_bytes(b"")
    (photos / "postscript.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    (photos / "large.png").write_bytes(image_bytes(50, 50, image_format="PNG"))
    (photos / "link.jpg").symlink_to(photos.parent / "outside.jpg")
    (photos / "circle.jpg").symlink_to(photos / "circle.jpg")
    found = build_jsonl([{"image": image, "targets": GOOD["targets"]}, GOOD], max_pixels=2000)
    assert reasons(found) == [("sample", reason)]
    assert found["records"]["b"]["targets"] == [GOOD_RECORD]


def test_an_absolute_path_is_outside(build_jsonl: Build, photos: Path) -> None:
    outside = photos.parent / "outside.jpg"
    outside.write_bytes(image_bytes())
    assert reasons(build_jsonl([{**GOOD, "image": str(outside)}, GOOD])) == [("sample", "path_outside_images")]


@pytest.mark.parametrize("ext", ["jpeg", "png", "webp", "bmp", "tif", "tiff", "JPG"])
def test_every_supported_extension(build_jsonl: Build, photos: Path, ext: str) -> None:
    formats = {"jpeg": "JPEG", "jpg": "JPEG", "tif": "TIFF"}
    data = image_bytes(image_format=formats.get(ext.lower(), ext.upper()))
    (photos / f"x.{ext}").write_bytes(data)
    assert set(build_jsonl([{**GOOD, "image": f"x.{ext}"}])["records"]) == {"x"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{not json", "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b'{"image": "a.jpg", "targets": [{"phrase": "\xb9\xb7", "boxes": [[0, 0, 9, 9]]}]}', "not_utf8"),
        (b'{"image": "\xff.jpg", "targets": []}', "not_utf8"),
        (rb'{"image": "a.jpg", "targets": [{"phrase": "\ud800", "boxes": [[0, 0, 9, 9]]}]}', "not_utf8"),
        (b"[1, 2]", "bad_field"),
        (b'{"file_name": "a.jpg"}', "bad_field"),
        (b'{"image": "a.jpg", "targets": {}}', "bad_field"),
        (b'{"image": "a.jpg", "key": 7, "targets": []}', "bad_field"),
        (b'{"image": "a.jpg"}', "no_targets"),
        (b'{"image": "a.jpg", "targets": []}', "no_targets"),
    ],
)
def test_bad_lines(build_jsonl: Build, line: bytes, reason: str) -> None:
    found = build_jsonl([line, b"", GOOD])
    assert reasons(found) == [("sample", reason)]
    assert found["rejected"][0]["source"] == "lines.jsonl:1"
    assert found["records"]["b"]["targets"] == [GOOD_RECORD]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ({"phrase": "", "boxes": [[0, 0, 9, 9]]}, "empty_phrase"),
        ({"phrase": " \n", "boxes": [[0, 0, 9, 9]]}, "empty_phrase"),
        ({"phrase": 7, "boxes": [[0, 0, 9, 9]]}, "bad_field"),
        ({"boxes": [[0, 0, 9, 9]]}, "bad_field"),
        ({"phrase": "dog"}, "bad_field"),  # no boxes given is not the same as "not in the picture"
        ({"phrase": "dog", "boxes": None}, "bad_field"),
        ({"phrase": "dog", "boxes": [[0, 0, 9, 9]], "language": "fr"}, "bad_field"),
        ({"phrase": "dog", "boxes": [[0, 0, 9, 9]], "language": []}, "bad_field"),
        ({"phrase": "dog", "boxes": [[0, 0, 9, 9]], "description": 3}, "bad_field"),
        ("dog", "bad_field"),
    ],
)
def test_a_bad_target_is_lost_alone(build_jsonl: Build, target: Any, reason: str) -> None:
    found = build_jsonl([{"image": "b.jpg", "targets": [target, GOOD["targets"][0]]}])
    assert reasons(found) == [("target", reason)]
    assert found["records"]["b"]["targets"] == [GOOD_RECORD]


@pytest.mark.parametrize("turn", [{"prompt": "p"}, {"prompt": "p", "answer": ""}, {"prompt": 1, "answer": "q"}, "p"])
def test_a_bad_turn_is_lost_alone(build_jsonl: Build, turn: Any) -> None:
    found = build_jsonl([{**GOOD, "turns": [turn, {"prompt": "p", "answer": "q"}]}])
    assert reasons(found) == [("turn", "bad_field")]
    assert found["records"]["b"]["turns"] == [{"prompt": "p", "answer": "q"}]


def test_a_second_line_with_the_same_key_is_rejected_with_a_hint(build_jsonl: Build) -> None:
    lines = [GOOD, {**GOOD, "image": "./b.jpg"}, {**GOOD, "image": "a.jpg", "key": "b"}, {**GOOD, "key": "other"}]
    found = build_jsonl(lines)
    assert reasons(found) == [("sample", "duplicate_key")] * 2
    assert [row["source"] for row in found["rejected"]] == ["lines.jsonl:2", "lines.jsonl:3"]
    assert "on one line" in found["rejected"][0]["detail"]
    assert set(found["records"]) == {"b", "other"}


@pytest.mark.parametrize("line", [b"\xff\xfe{\0}\0", b'{"images": [], "annotations": []}', b""])
def test_a_file_without_a_single_usable_line_is_a_data_error(build_jsonl: Build, line: bytes) -> None:
    with pytest.raises(DataError, match=r'none of its . lines can be used.*"image"'):
        build_jsonl([line])


def test_nothing_left_is_a_data_error_with_the_first_reason(build_jsonl: Build, photos: Path) -> None:
    with pytest.raises(DataError, match=r"no sample is left.*missing_image"):
        build_jsonl([{**GOOD, "image": "gone.jpg"}])
    assert (photos.parent / "out" / "rejected.jsonl").exists() and not (photos.parent / "out" / "index.json").exists()


def coco(**changes: Any) -> dict[str, Any]:
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 19, 13], "iscrowd": 0}
    content: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "猫"}, {"id": 3, "name": " "}],
        "annotations": [annotation, {**annotation, "category_id": 2, "bbox": [0, 0, 5, 5]}],
    }
    for name, more in changes.items():
        content[name] = content[name] + [{**annotation, **one} if name == "annotations" else one for one in more]
    return content


def test_coco_boxes_become_corners_and_one_target_per_category(build_coco: Build) -> None:
    found = build_coco(coco(annotations=[{"bbox": [30, 20, 10, 10]}]))
    assert found["records"]["a"]["targets"] == [
        {"phrase": "dog", "language": "en", "boxes_xyxy": [[1, 2, 20, 15], [30, 20, 40, 30]], "description": None},
        {"phrase": "猫", "language": "zh", "boxes_xyxy": [[0, 0, 5, 5]], "description": None},
    ]
    assert not found["rejected"]


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        ({"image_id": 9}, [("box", "unknown_image_id")]),
        ({"image_id": [1]}, [("box", "unknown_image_id")]),
        ({"category_id": 9}, [("box", "unknown_category_id")]),
        ({"category_id": None}, [("box", "unknown_category_id")]),
        ({"iscrowd": 1}, [("box", "crowd")]),
        ({"bbox": [5, 5, -3, 3]}, [("box", "inverted_box")]),
        ({"bbox": [5, 5, 0, 3]}, [("box", "zero_area")]),
        ({"bbox": [5, 5, 3]}, [("box", "wrong_number_of_coordinates")]),
        ({"bbox": None}, [("box", "bad_field")]),
        ({"bbox": [5, 5, float("nan"), 3]}, [("box", "not_finite")]),
        ({"bbox": [5, 5, 1e308, 1e308]}, [("box", "box_outside_image")]),
        ({"category_id": 3}, [("target", "empty_phrase")]),
    ],
)
def test_a_bad_coco_annotation_is_lost_alone(build_coco: Build, annotation: Any, expected: Any) -> None:
    found = build_coco(coco(annotations=[annotation]))
    assert reasons(found) == expected
    assert [target["boxes_xyxy"] for target in found["records"]["a"]["targets"]] == [[[1, 2, 20, 15]], [[0, 0, 5, 5]]]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ({"id": 2, "file_name": "b.jpg"}, "no_targets"),
        ({"id": 2, "file_name": "b\udcff.jpg"}, "not_utf8"),
        ({"id": 1, "file_name": "a.jpg"}, "bad_field"),
        ({"id": 2}, "bad_field"),
        ({"file_name": "b.jpg"}, "bad_field"),
        ("b.jpg", "bad_field"),
    ],
)
def test_a_bad_coco_image_is_lost_alone(build_coco: Build, image: Any, reason: str) -> None:
    found = build_coco(coco(images=[image]))
    assert reasons(found) == [("sample", reason)] and set(found["records"]) == {"a"}


def test_the_boxes_of_a_rejected_coco_image_are_not_called_unknown(build_coco: Build) -> None:
    found = build_coco(coco(images=[{"id": 2, "file_name": ""}], annotations=[{"image_id": 2}]))
    assert reasons(found) == [("sample", "bad_field")]


def test_coco_boxes_made_for_another_size_are_rejected(build_coco: Build) -> None:
    turned = {"id": 2, "file_name": "b.jpg", "width": 30, "height": 40}
    found = build_coco(coco(images=[turned], annotations=[{"image_id": 2}]))
    assert reasons(found) == [("sample", "size_mismatch")] and set(found["records"]) == {"a"}


def test_coco_strings_that_are_not_utf8(build_coco: Build) -> None:
    content = json.dumps(coco(annotations=[{"category_id": 3}]), ensure_ascii=False).encode()
    found = build_coco(content.replace(b'"name": " "', b'"name": "\xb9\xb7"'))
    assert reasons(found) == [("target", "not_utf8")] and len(found["records"]["a"]["targets"]) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<xml/>", "is not valid JSON"),
        (b'{"image": "a.jpg"}\n{"image": "b.jpg"}\n', "--format jsonl"),
        (b"[]", "holds a list"),
        (b'{"images": [], "annotations": [], "info": 1}', "no list called categories; found annotations, images, info"),
        (b'{"images": {}, "annotations": [], "categories": []}', "no list called images"),
    ],
)
def test_a_file_that_is_no_coco_is_a_data_error_that_says_what_was_found(
    build_coco: Build, content: bytes, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        build_coco(content)
