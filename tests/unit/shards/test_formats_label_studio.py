"""Label Studio: percent, rotation, brushes, several annotators, addresses of photos, both exports."""

from __future__ import annotations

import base64
import random
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from case_files import CASES, build_case, write_photo
from format_files import read_all, write_json
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.formats import recognise_format
from cogvlm_ft.shards.formats.label_studio import read_label_studio, recognise_label_studio

BOX = {"x": 10, "y": 10, "width": 20, "height": 20, "rotation": 0}


def result(value: dict[str, Any], kind: str = "rectanglelabels", number: str = "a", **fields: Any) -> dict[str, Any]:
    size = {"original_width": 100, "original_height": 80, "image_rotation": 0}
    return {"id": number, "type": kind, "to_name": "image", "from_name": "label", **size, "value": value, **fields}


def dog(**changes: Any) -> dict[str, Any]:
    return result({**BOX, **changes, "rectanglelabels": ["dog"]})


def task(*results: dict[str, Any], number: int = 1, image: str = "a.jpg", **annotation: Any) -> dict[str, Any]:
    entry = {"id": 5, "result": list(results), "was_cancelled": False, **annotation}
    return {"id": number, "data": {"image": image}, "annotations": [entry], "predictions": []}


@pytest.mark.parametrize("name", ["min.json", "project.json"])
def test_14_both_exports(tmp_path: Path, capsys: Any, name: str) -> None:
    found = build_case(CASES / "14-label-studio-json/in" / name, tmp_path, capsys)
    assert found.boxes == {"a": {"dog": ((10, 8, 30, 24),)}}
    assert found.reasons == [] and found.noted == ["image_name_matched"]


SHAPES = {
    "rectangle": (dog(), (10, 8, 30, 24)),
    "turned by a quarter": (dog(rotation=90), (-6, 8, 10, 28)),
    "turned a little": (dog(rotation=30), (2, 8, 27.320508, 31.856406)),
    "polygon": (
        result({"points": [[1, 5], [50, 5], [20, 50.5]], "polygonlabels": ["dog"]}, "polygonlabels"),
        (1, 4, 50, 40.4),
    ),
    "ellipse": (
        result({"x": 50, "y": 50, "radiusX": 10, "radiusY": 20, "ellipselabels": ["dog"]}, "ellipselabels"),
        (40, 24, 60, 56),
    ),
    "ellipse turned": (
        result(
            {"x": 50, "y": 50, "radiusX": 10, "radiusY": 20, "rotation": 90, "ellipselabels": ["dog"]}, "ellipselabels"
        ),
        (34, 30, 66, 50),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(tmp_path: Path, name: str) -> None:
    entry, box = SHAPES[name]
    found = read_all(read_label_studio, write_json(tmp_path / "x.json", [task(entry)]))
    assert found.only.targets[0].boxes_xyxy[0] == pytest.approx(box, abs=1e-5)
    assert found.only.stated_size_px == (100, 80) and found.only.units == "pixels"
    assert found.reasons == [("note", "box_around_rotated")] * ("turned" in name)


LOST = {
    "key point": (result({"x": 1, "y": 1, "width": 1, "keypointlabels": ["dog"]}, "keypointlabels"), "no_area"),
    "whole photo": (result({"choices": ["night"]}, "choices"), "no_area"),
    "video": (result({"sequence": []}, "videorectangle"), "no_area"),
    "no label": (result({**BOX}, "rectangle"), "empty_phrase"),
    "turned photo": ({**dog(), "image_rotation": 90}, "rotated_image"),
    "another size": ({**dog(), "original_width": 200}, "contradiction"),
    "text for a number": (dog(x="left"), "not_numeric"),
    "no width": (dog(width=None), "not_numeric"),
    "damaged brush": (result({"format": "rle", "rle": [1, 2], "brushlabels": ["dog"]}, "brushlabels"), "bad_field"),
    "no object": (7, "no_area"),
}


@pytest.mark.parametrize("name", LOST)
def test_regions_that_are_lost_are_reported(tmp_path: Path, name: str) -> None:
    entry, reason = LOST[name]
    cat = result({**BOX, "rectanglelabels": ["cat"]})
    found = read_all(read_label_studio, write_json(tmp_path / "x.json", [task(cat, entry)]))
    assert found.boxes == {"a.jpg": {"cat": ((10, 8, 30, 24),)}}
    assert ("box", reason) in found.reasons and found.problems[0].source == "task 1 annotation 5 result[1]"


def test_text_of_a_region_is_its_phrase(tmp_path: Path) -> None:
    entries = [
        result(BOX, "rectangle", "r"),
        result({**BOX, "labels": ["Text"]}, "labels", "r"),
        result({**BOX, "text": ["紧急\n出口"]}, "textarea", "r"),
        result(BOX, "rectangle", "s"),
        result({**BOX, "labels": ["Sign"]}, "labels", "s"),
    ]
    found = read_all(read_label_studio, write_json(tmp_path / "x.json", [task(*entries)]))
    assert set(found.boxes["a.jpg"]) == {"紧急 出口", "Sign"} and found.reasons == [("note", "not_a_target")] * 3


def packed(mask: list[list[int]], rng: random.Random) -> list[int]:
    """Label Studio's run lengths of a mask, cut into runs and literal values at random."""
    values = [value for row in mask for pixel in row for value in (pixel, pixel, pixel, 255 * pixel)]
    lengths = [rng.randint(1, 16) for _ in range(4)]
    bits = f"{len(values):032b}{7:05b}{''.join(f'{length - 1:04b}' for length in lengths)}"
    place = 0
    while place < len(values):
        kind = rng.randrange(4)
        count = rng.randint(1, min(2 ** lengths[kind], len(values) - place))
        part = values[place : place + count]
        is_run = len(set(part)) == 1
        bits += f"{int(is_run)}{kind:02b}{count - 1:0{lengths[kind]}b}"
        bits += "".join(f"{value:08b}" for value in (part[:1] if is_run else part))
        place += count
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


@settings(max_examples=30, deadline=None)
@given(x=st.integers(0, 15), y=st.integers(0, 9), width=st.integers(1, 5), height=st.integers(1, 4), seed=st.integers())
def test_brushes(x: int, y: int, width: int, height: int, seed: int) -> None:
    mask = [[int(x <= column < x + width and y <= row < y + height) for column in range(21)] for row in range(14)]
    value = {"format": "rle", "rle": packed(mask, random.Random(seed)), "brushlabels": ["狗"]}
    entry = result(value, "brushlabels", original_width=21, original_height=14)
    with tempfile.TemporaryDirectory() as folder:
        found = read_all(read_label_studio, write_json(Path(folder) / "x.json", [task(entry)]))
    assert found.boxes == {"a.jpg": {"狗": ((x, y, x + width, y + height),)}} and not found.problems


def test_the_best_annotation_of_several(tmp_path: Path) -> None:
    """Each person drew the same dog: one of them is used, the others are reported."""
    one, two, three = (task(dog(x=x))["annotations"][0] | {"id": x} for x in (1, 2, 3))
    times = [{"updated_at": f"2026-01-0{day}T00:00:00Z"} for day in (2, 3, 1)]
    used = {}
    for name, extras in (
        ("last", times),
        ("truth", [{**times[0], "ground_truth": True}, *times[1:]]),
        ("skipped", [times[0], {**times[1], "was_cancelled": True}, times[2]]),
    ):
        annotations = [entry | extra for entry, extra in zip((one, two, three), extras, strict=True)]
        content = [{**task(), "annotations": annotations}]
        found = read_all(read_label_studio, write_json(tmp_path / "x.json", content))
        used[name] = found.only.targets[0].boxes_xyxy[0][0]
        assert len(found.problems) == 2 and {level for level, _ in found.reasons} == {"box"}
    assert used == {"last": 2, "truth": 1, "skipped": 1}
    assert {reason for _, reason in found.reasons} == {"other_annotation", "skipped_annotation"}


def test_what_was_not_annotated_is_no_background(tmp_path: Path) -> None:
    content = [
        {**task(number=1, image="a.jpg"), "annotations": [], "predictions": [{"result": [dog()]}]},
        task(number=2, image="b.jpg", was_cancelled=True),
        task(number=3, image="c.jpg"),
        {"id": 4, "image": "d.jpg"},
        {"id": 5, "image": "e.jpg", "annotation_id": 9},
    ]
    found = read_all(read_label_studio, write_json(tmp_path / "x.json", content))
    assert found.boxes == {"c.jpg": {}, "e.jpg": {}}
    assert found.reasons == [("sample", "not_annotated")] * 3 and "only predictions" in found.problems[0].detail


def test_tasks_of_two_projects_with_one_id(tmp_path: Path) -> None:
    content = [task(dog(x=1), image="a.jpg"), task(dog(x=2), image="b.jpg"), task(dog(x=3), number=2, image="a.jpg")]
    found = read_all(read_label_studio, write_json(tmp_path / "x.json", content))
    assert {image: boxes["dog"][0][0] for image, boxes in found.boxes.items()} == {"a.jpg": 1, "b.jpg": 2}
    assert found.reasons == [("sample", "image_listed_again")]


def test_a_region_never_comes_to_the_other_photo_of_a_task(tmp_path: Path) -> None:
    """A task compares two photos: the regions of the second one are no boxes of the first one."""
    content = task(dog(), dog() | {"to_name": "image2"})
    content["data"]["image2"] = "b.jpg"
    other = task(dog() | {"to_name": "image2"}, number=2, image="c.jpg")
    other["data"]["image2"] = "d.jpg"
    found = read_all(read_label_studio, write_json(tmp_path / "x.json", [content, other]))
    assert list(found.boxes) == ["d.jpg"] and found.reasons == [("sample", "several_images")]
    assert "'image' and 'image2'" in found.problems[0].detail


def test_percent_without_the_size_of_the_photo(tmp_path: Path) -> None:
    entries = [dog(), dog(rotation=10)]
    for entry in entries:
        del entry["original_width"]
    found = read_all(read_label_studio, write_json(tmp_path / "x.json", [task(*entries)]))
    assert found.only.units == "unit" and found.boxes == {
        "a.jpg": {"dog": ((0.1, 0.1, pytest.approx(0.3), pytest.approx(0.3)),)}
    }
    assert found.reasons == [("box", "no_size")]


NAMES = st.sampled_from(["a.jpg", "一只 狗.png", "sub/b c.JPG", "sub/deep/d.webp"])


@settings(max_examples=30, deadline=None)
@given(
    name=NAMES,
    box=st.tuples(st.integers(0, 50), st.integers(0, 40), st.integers(1, 50), st.integers(1, 40)),
    size=st.sampled_from([(100, 80), (31, 97), (640, 13)]),
    how=st.sampled_from(["{0}", "/data/local-files/?d={1}", "https://h.org/{1}", "s3://bucket/{0}", "fileuri"]),
    layout=st.sampled_from(["", "images/"]),
    is_min=st.booleans(),
)
def test_boxes_come_to_their_photos(
    name: str, box: tuple[int, ...], size: tuple[int, int], how: str, layout: str, is_min: bool
) -> None:
    """In pixels of a photo of any shape, whatever the address of the photo looks like."""
    address = how.format(name, quote(name))
    if how == "fileuri":
        address = f"/tasks/1/presign/?fileuri={base64.b64encode(f's3://bucket/{name}'.encode()).decode()}"
    x, y, width, height = box
    value = {"x": 100 * x / size[0], "y": 100 * y / size[1], "width": 100 * width / size[0]}
    value |= {"height": 100 * height / size[1], "rotation": 0, "rectanglelabels": ["狗"]}
    stated = {"original_width": size[0], "original_height": size[1]}
    content = [task(result(value, **stated), image=address)]
    if is_min:
        content = [{"id": 3, "photo": address, "label": [{**value, **stated}]}]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, layout, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        found = read_all(read_label_studio, write_json(Path(folder) / "x.json", content))
        assert recognise_format(Path(folder))[0] == recognise_format(Path(folder) / "x.json")[0] == "label-studio"
    expected = (x, y, x + width, y + height)
    assert found.only.targets[0].boxes_xyxy[0] == pytest.approx(expected, abs=1e-6)
    assert found.only.image in (f"{layout}{name}", name)


def test_addresses_that_differ_from_the_files(tmp_path: Path, capsys: Any) -> None:
    """The photos are matched by the part of the address that is certain, on a build as a user starts it."""
    addresses = ["/data/upload/1/0a1b2c3d-a.jpg", "/data/local-files/?d=set/b%20c.jpg", "https://h.org/x/d.jpg?token=1"]
    files = ["media/upload/1/0a1b2c3d-a.jpg", "set/b c.jpg", "d.jpg"]
    for i, name in enumerate(files):
        write_photo(tmp_path / "in" / name, seed=i)
    content = [task(dog(x=i), number=i, image=address) for i, address in enumerate(addresses)]
    write_json(tmp_path / "in/x.json", content)
    found = build_case(tmp_path / "in", tmp_path / "out", capsys)
    assert sorted(boxes["dog"][0][0] for boxes in found.boxes.values()) == [0, 1, 2] and found.reasons == []
    by_end = {key.rpartition("_")[2][:1]: boxes["dog"][0][0] for key, boxes in found.boxes.items()}
    assert by_end["d"] == 2


def test_what_is_not_of_label_studio(tmp_path: Path) -> None:
    for content in ([], {}, 7, [{"image": "a.jpg", "annotations": []}]):
        path = write_json(tmp_path / "x.json", content)
        assert recognise_label_studio(path) is None and recognise_label_studio(tmp_path) is None
    with pytest.raises(DataError, match=r"no \.json file of Label Studio"):
        read_all(read_label_studio, tmp_path)
    with pytest.raises(DataError, match="array of tasks"):
        read_all(read_label_studio, write_json(tmp_path / "x.json", {}))
