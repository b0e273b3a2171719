"""COCO as tools write it: text for numbers, photos listed twice, masks, fractions, other paths, and folders of it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from case_files import CASES, build_case, write_photo
from format_files import read_all, write_json
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.formats import FORMATS
from cogvlm_ft.shards.formats.coco import read_coco, recognise_coco
from cogvlm_ft.shards.formats.coco_bboxes import Bbox, check_sizes

DOG = (1, 2, 21, 12)


def test_07_one_photo_under_two_ids(tmp_path: Path, capsys: Any) -> None:
    found = build_case(CASES / "07-coco-image-twice/in/i.json", tmp_path, capsys)
    assert found.boxes == {"a": {"dog": (DOG,), "cat": ((30, 30, 50, 50),)}}
    assert found.reasons == [] and found.noted == ["image_listed_again"]


@pytest.mark.parametrize("name", ["i.json", "crowd.json"])
def test_08_numbers_as_text(tmp_path: Path, capsys: Any, name: str) -> None:
    found = build_case(CASES / "08-coco-strings/in" / name, tmp_path, capsys)
    assert found.boxes == {"a": {"dog": (DOG,)}} and found.reasons == []


def test_17_other_spellings_of_paths(tmp_path: Path, capsys: Any) -> None:
    found = build_case(CASES / "17-file-names/in/i.json", tmp_path, capsys)
    assert len(found.boxes) == 5 and all(boxes == {"dog": (DOG,)} for boxes in found.boxes.values())
    assert found.reasons == [] and found.noted == ["image_name_matched"] * 4


def test_21_masks(tmp_path: Path, capsys: Any) -> None:
    found = build_case(CASES / "21-coco-rle-iscrowd/in/i.json", tmp_path, capsys)
    assert found.boxes == {"b": {"dog": (DOG,) * 3}} and found.noted == ["box_around_outline"] * 3
    assert found.reasons == ["crowd", "no_targets_left"]
    assert "If a tool marks every mask so, set iscrowd to 0" in found.rejected[0]["detail"]


def test_21_masks_alone_are_objects(tmp_path: Path) -> None:
    content = json.loads((CASES / "21-coco-rle-iscrowd/in/i.json").read_text())
    content["annotations"] = content["annotations"][:1]
    found = read_all(read_coco, write_json(tmp_path / "i.json", content))
    assert found.boxes == {"a.jpg": {"dog": (DOG,)}, "b.jpg": {}} and found.reasons == [("note", "crowd_as_object")]
    content["annotations"][0] |= {"bbox": None}
    found = read_all(read_coco, write_json(tmp_path / "i.json", content))
    assert found.boxes["a.jpg"] == {"dog": ((2, 1, 3, 11),)}  # ten pixels of one column


def test_25_fractions(tmp_path: Path, capsys: Any) -> None:
    found = build_case(CASES / "25-coco-normalised/in/i.json", tmp_path, capsys)
    assert found.boxes == {key: {"dog": ((10, 16, 30, 48),)} for key in "abcd"}
    assert found.reasons == [] and found.noted == ["box_unit_inferred"]


def test_one_box_of_fractions_among_pixels_is_reported(tmp_path: Path) -> None:
    content = json.loads((CASES / "25-coco-normalised/in/i.json").read_text())
    content["annotations"][1]["bbox"] = [10, 20, 30, 40]
    found = read_all(read_coco, write_json(tmp_path / "i.json", content))
    assert [part.image for part in found.candidates if part.targets] == ["b.jpg"]
    assert found.reasons.count(("box", "ambiguous_unit")) == 3


LAYOUTS = {
    "c-roboflow-coco": 3,
    "f-cvat-coco": 1,
    "f2-cvat-coco": 1,
    "l-ls-coco": 1,
    "l2-ls-coco": 1,
    "l3-ls-coco": 1,
    "q-fiftyone-coco": 1,
    "s-coco": 1,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_30_folders(tmp_path: Path, capsys: Any, name: str) -> None:
    found = build_case(CASES / "30-layouts" / name, tmp_path, capsys)
    assert list(found.boxes.values()) == [{"dog": ((10, 16, 60, 64),)}] * LAYOUTS[name]
    assert found.reasons == []


def coco(file_names: list[str], size: tuple[int, int], boxes: list[tuple[int, ...]], **extra: Any) -> dict[str, Any]:
    images = [
        {"id": 10 + i, "file_name": name, "width": size[0], "height": size[1]} for i, name in enumerate(file_names)
    ]
    annotations = [
        {"id": i, "image_id": 10 + i % len(file_names), "category_id": 3, "bbox": list(box), **extra}
        for i, box in enumerate(boxes)
    ]
    return {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "dog"}]}


def corners(box: tuple[int, ...]) -> tuple[int, ...]:
    return box[0], box[1], box[0] + box[2], box[1] + box[3]


BOXES = st.lists(
    st.tuples(st.integers(2, 40), st.integers(2, 30), st.integers(2, 50), st.integers(2, 45)), min_size=1, max_size=5
)


@settings(max_examples=30, deadline=None)
@given(boxes=BOXES, data=st.data())
def test_text_for_numbers_changes_nothing(boxes: list[tuple[int, ...]], data: st.DataObject) -> None:
    content = coco(["a.jpg", "b.jpg"], (100, 80), boxes, iscrowd=0)
    names = data.draw(st.sets(st.sampled_from(["image_id", "category_id", "iscrowd", "bbox", "width", "id"])))
    kind = data.draw(st.sampled_from([str, float, lambda value: f"{value}.0", lambda value: f" {value} "]))
    with tempfile.TemporaryDirectory() as folder:
        plain = read_all(read_coco, write_json(Path(folder) / "i.json", content))
        for entry in (*content["images"], *content["annotations"], *content["categories"]):
            for name in names.intersection(entry):
                value = entry[name]
                is_whole = isinstance(value, int) and name != "width" and kind(value) == f"{value}.0"
                entry[name] = [kind(side) for side in value] if name == "bbox" else value if is_whole else kind(value)
        found = read_all(read_coco, write_json(Path(folder) / "i.json", content))
    assert found.boxes == plain.boxes
    assert [part.stated_size_px for part in found.candidates] == [(100, 80)] * 2
    assert all(problem.is_note for problem in found.problems)


@settings(max_examples=30, deadline=None)
@given(boxes=BOXES, num_ids=st.integers(2, 4))
def test_boxes_of_a_photo_under_several_ids_are_all_there_once(boxes: list[tuple[int, ...]], num_ids: int) -> None:
    content = coco(["a.jpg"] * num_ids, (100, 80), boxes)
    with tempfile.TemporaryDirectory() as folder:
        found = read_all(read_coco, write_json(Path(folder) / "i.json", content))
    kept = found.only.targets[0].boxes_xyxy
    assert kept == tuple(dict.fromkeys(corners(box) for box in boxes))
    assert found.reasons.count(("box", "same_box")) == len(boxes) - len(kept)
    assert found.reasons.count(("note", "image_listed_again")) == num_ids - 1


def test_a_photo_under_two_ids_with_two_sizes(tmp_path: Path) -> None:
    content = coco(["a.jpg", "a.jpg"], (100, 80), [(1, 2, 20, 10), (3, 4, 20, 10)])
    content["images"][1]["width"] = 200
    found = read_all(read_coco, write_json(tmp_path / "i.json", content))
    assert found.boxes == {"a.jpg": {"dog": (DOG,)}} and found.reasons == [("sample", "contradiction")]


def mask_of(box: tuple[int, ...], size: tuple[int, int]) -> list[int]:
    """Run lengths down the columns."""
    (x, y, width, height), (_, image_height) = box, size
    runs = [x * image_height + y]
    for _ in range(width):
        runs += [height, image_height - height]
    runs[-1] += size[0] * image_height - sum(runs)
    return runs


def as_text(runs: list[int]) -> str:
    """COCO's compressed form."""
    text = ""
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        while True:
            bits, value = value & 0x1F, value >> 5
            is_last = value in (0, -1) and (value == -1) == bool(bits & 0x10)
            text += chr(48 + bits + (0 if is_last else 0x20))
            if is_last:
                break
    return text


@settings(max_examples=30, deadline=None)
@given(boxes=BOXES, bbox=st.sampled_from([None, [], [0, 0, 0, 0], "missing"]), kind=st.sampled_from("pqrt"))
def test_boxes_around_outlines(boxes: list[tuple[int, ...]], bbox: Any, kind: str) -> None:
    content = coco([f"{i}.jpg" for i in range(len(boxes))], (100, 80), boxes)
    for annotation, box in zip(content["annotations"], boxes, strict=True):
        x0, y0, x1, y1 = corners(box)
        runs = mask_of(box, (100, 80))
        annotation["segmentation"] = {
            "p": [[x0, y0, x1, y0, x1, y1, x0, y1]],
            "q": [[x0, y0, x1, y0, x0 + 1, y1], [x0, y1, x1, y1 - 1, x1, y0]],
            "r": {"counts": runs, "size": [80, 100]},
            "t": {"counts": as_text(runs), "size": [80, 100]},
        }[kind]
        annotation["bbox"] = bbox
        if bbox == "missing":
            del annotation["bbox"]
    with tempfile.TemporaryDirectory() as folder:
        found = read_all(read_coco, write_json(Path(folder) / "i.json", content))
    assert found.boxes == {f"{i}.jpg": {"dog": (corners(box),)} for i, box in enumerate(boxes)}
    assert found.reasons == [("note", "box_around_outline")] * len(boxes)


FOLDERS = {
    "roboflow": ("{0}/_annotations.coco.json", "{0}/{1}", "{1}"),
    "official": ("annotations/instances_{0}.json", "{0}/{1}", "{1}"),
    "cvat": ("annotations/instances_{0}.json", "images/{0}/{1}", "{1}"),
    "by name": ("{0}.json", "{0}/{1}", "{1}"),
    "paths": ("all_{0}.json", "images/{0}/{1}", "images/{0}/{1}"),
    "paths below images": ("all_{0}.json", "images/{0}/{1}", "{0}/{1}"),
}


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(sorted(FOLDERS)), num_photos=st.integers(1, 3), data=st.data())
def test_equal_names_in_two_subsets_are_two_photos(name: str, num_photos: int, data: st.DataObject) -> None:
    """Roboflow's train/1.jpg and valid/1.jpg: a box never comes to the photo of the other subset."""
    file, photo, listed = FOLDERS[name]
    subsets = data.draw(st.permutations(["train", "valid", "extra"]))
    with tempfile.TemporaryDirectory() as folder:
        for i, subset in enumerate(subsets):
            names = [f"{number}.jpg" for number in range(num_photos)]
            for base in names:
                path = Path(folder, photo.format(subset, base))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            boxes = [(10 * i + number, 2, 5, 9) for number in range(num_photos)]
            write_json(
                Path(folder, file.format(subset)),
                coco([listed.format(subset, base) for base in names], (100, 80), boxes),
            )
        assert recognise_coco(Path(folder)) is not None
        found = read_all(read_coco, Path(folder), Path(folder))
    expected = {
        photo.format(subset, f"{number}.jpg"): {"dog": ((10 * i + number, 2, 10 * i + number + 5, 11),)}
        for i, subset in enumerate(subsets)
        for number in range(num_photos)
    }
    assert found.boxes == expected and found.problems == []


def test_files_about_the_same_photos(tmp_path: Path) -> None:
    content = coco(["a.jpg"], (100, 80), [(1, 2, 20, 10)])
    (tmp_path / "a.jpg").touch()
    write_json(tmp_path / "annotations/instances_x.json", content)
    write_json(tmp_path / "annotations/person_keypoints_x.json", content)
    found = read_all(read_coco, tmp_path, tmp_path)
    assert found.boxes == {"a.jpg": {"dog": (DOG,)}} and found.reasons == [("note", "other_file")]
    write_json(tmp_path / "copy.json", content)
    found = read_all(read_coco, tmp_path, tmp_path)
    assert found.reasons == [("note", "other_file"), ("sample", "image_in_two_files")]
    assert "also listed in copy.json. Remove one" in found.problems[1].detail


def test_a_photo_in_two_folders_of_images(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", coco(["a.jpg"], (100, 80), [(1, 2, 20, 10)]))
    for folder in ("images", "data"):
        write_photo(tmp_path / folder / "a.jpg")
    found = read_all(read_coco, tmp_path, tmp_path)
    assert found.reasons == [("sample", "ambiguous_image")]
    assert "images/a.jpg or data/a.jpg" in found.problems[0].detail


@given(st.lists(st.tuples(*[st.integers(0, 99)] * 4), min_size=2, max_size=40), st.booleans())
def test_one_box_outside_its_photo_condemns_no_file(boxes: list[tuple[int, ...]], with_area: bool) -> None:
    """Sizes whose areas say so, or in a large file, are read; else they are refused as unclear, never as corners."""
    sizes = [(x, y, 1 + w % (100 - x), 1 + h % (100 - y)) for x, y, w, h in boxes] + [(40, 30, 90, 95)]
    bboxes = [Bbox(box, (100, 100), box[2] * box[3] if with_area else None, None) for box in sizes]
    is_unclear = not with_area and len(sizes) < 20 and all(x < w and y < h for x, y, w, h in sizes)
    if is_unclear:
        with pytest.raises(DataError, match=r"may be .*1 of .*--format coco-xywh if.*--format coco-xyxy if"):
            check_sizes(bboxes, Path("x.json"))
    else:
        check_sizes(bboxes, Path("x.json"))


@pytest.mark.parametrize("kind", [int, str])
def test_the_user_states_what_an_unclear_bbox_is(tmp_path: Path, kind: type) -> None:
    boxes = [(10, 12, 40, 30), (20, 9, 60, 70), (50, 20, 70, 60)]  # the last one leaves 100 x 80 px as a size
    content = coco(["a.jpg"], (100, 80), [tuple(map(kind, box)) for box in boxes])
    path = write_json(tmp_path / "i.json", content)
    with pytest.raises(DataError, match="--format coco-xywh"):
        read_all(read_coco, path)
    assert read_all(FORMATS["coco-xyxy"].read, path).only.targets[0].boxes_xyxy == tuple(boxes)
    sizes = read_all(FORMATS["coco-xywh"].read, path).only.targets[0].boxes_xyxy
    assert sizes == tuple(corners(box) for box in boxes)
    assert FORMATS["coco-xyxy"].recognise(path) is None
