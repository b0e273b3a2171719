"""ODVG of Grounding DINO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from format_files import Reading, read_all, write_json, write_lines

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.formats.odvg import read_odvg, recognise_odvg

DATA = Path(__file__).parents[3].parent / "shared" / "data"

GROUNDING: dict[str, Any] = {
    "filename": "014127544.jpg",
    "height": 400,
    "width": 600,
    "grounding": {
        "caption": "Homemade Raw Organic Cream Cheese",
        "regions": [
            {"bbox": [5.98, 2.91, 599.0, 399.2], "phrase": "Homemade Raw Organic Cream Cheese"},
            {"bbox": [[1, 2, 30, 40], [5, 6, 70, 80]], "phrase": "two jars"},
        ],
    },
}
DETECTION: dict[str, Any] = {
    "filename": "b.jpg",
    "height": 30,
    "width": 40,
    "detection": {
        "instances": [
            {"bbox": [1, 2, 10, 12], "label": 16, "category": "狗"},
            {"bbox": [3, 4, 20, 30], "label": 17, "category": "cat"},
            {"bbox": [0, 0, 5, 5], "label": 16, "category": "狗"},
        ]
    },
}
FOUND = {
    "014127544.jpg": {
        "Homemade Raw Organic Cream Cheese": ((5.98, 2.91, 599.0, 399.2),),
        "two jars": ((1, 2, 30, 40), (5, 6, 70, 80)),
    },
    "b.jpg": {"狗": ((1, 2, 10, 12), (0, 0, 5, 5)), "cat": ((3, 4, 20, 30),)},
}


def read(tmp_path: Path, *lines: Any) -> Reading:
    return read_all(read_odvg, write_lines(tmp_path / "x.jsonl", list(lines)))


def with_instance(entry: Any) -> dict[str, Any]:
    return {**DETECTION, "detection": {"instances": [*DETECTION["detection"]["instances"], entry]}}


def test_lines_and_an_array_hold_the_same(tmp_path: Path) -> None:
    found = read(tmp_path, GROUNDING, DETECTION)
    assert found.boxes == FOUND and not found.problems
    assert [candidate.stated_size_px for candidate in found.candidates] == [(600, 400), (40, 30)]
    again = read_all(read_odvg, write_json(tmp_path / "x.json", [GROUNDING, DETECTION]))
    assert again.boxes == FOUND and [candidate.source for candidate in again.candidates] == ["x.json[0]", "x.json[1]"]


def test_captions_of_one_image_come_together(tmp_path: Path) -> None:
    other = {**GROUNDING, "grounding": {"caption": "jar", "regions": [{"bbox": [1, 2, 3, 4], "phrase": "jar"}]}}
    for path in (write_lines(tmp_path / "x.jsonl", [GROUNDING, DETECTION, other]), tmp_path / "x.json"):
        if path.suffix == ".json":
            write_json(path, [GROUNDING, DETECTION, other])
        found = read_all(read_odvg, path)
        assert found.boxes == {**FOUND, "014127544.jpg": {**FOUND["014127544.jpg"], "jar": ((1, 2, 3, 4),)}}


def test_a_label_map_beside_the_file_names_the_numbers(tmp_path: Path) -> None:
    line = with_instance({"bbox": [7, 7, 9, 9], "label": 2})
    found = read(tmp_path, line)
    assert found.reasons == [("target", "bad_field")] and "label_map.json" in found.problems[0].detail
    assert found.boxes["b.jpg"] == FOUND["b.jpg"]
    write_json(tmp_path / "label_map.json", {"2": "car"})
    found = read(tmp_path, line)
    assert found.boxes["b.jpg"]["car"] == ((7, 7, 9, 9),) and not found.problems


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"bbox": [1, 2, 3], "category": "狗"}, [("box", "wrong_number_of_coordinates")]),
        ({"bbox": None, "category": "狗"}, [("box", "bad_field")]),
        ({"bbox": [[1, 2, 3, 4], "x"], "category": "bird"}, [("box", "bad_field")]),
        ({"bbox": [1, 2, 3, "4"], "category": "bird"}, [("box", "not_numeric"), ("target", "no_boxes_left")]),
        ({"bbox": [1, 2, 3, 4], "category": 7}, [("target", "bad_field")]),
        ({"bbox": [1, 2, 3, 4], "category": " "}, [("target", "empty_phrase")]),
        ({"bbox": [1, 2, 3, 4], "label": [1]}, [("target", "bad_field")]),
        ({"bbox": [1, 2, 3, 4]}, [("target", "bad_field")]),
        ("dog", [("target", "bad_field")]),
    ],
)
def test_a_bad_entry_is_lost_alone(tmp_path: Path, entry: Any, expected: Any) -> None:
    found = read(tmp_path, with_instance(entry))
    assert found.reasons == expected and FOUND["b.jpg"].items() <= found.boxes["b.jpg"].items()
    assert all("x.jsonl:1" in problem.source for problem in found.problems)


@pytest.mark.parametrize(
    ("line", "level", "reason"),
    [
        ({"filename": "c.jpg"}, "sample", "bad_field"),
        ({"filename": "c.jpg", "grounding": []}, "sample", "bad_field"),
        ({"detection": {"instances": []}}, "sample", "bad_field"),
        ({"filename": "c.jpg", "detection": {"instances": 7}}, "target", "bad_field"),
        ({"filename": "c.jpg", "grounding": {"caption": "c"}}, "target", "bad_field"),
        (b"[1, 2]", "sample", "bad_field"),
        (b'{"filename": "c.jpg",', "sample", "bad_json"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_line_is_lost_alone(tmp_path: Path, line: Any, level: str, reason: str, first: bool) -> None:
    found = read(tmp_path, *([line, DETECTION] if first else [DETECTION, line]))
    assert found.reasons == [(level, reason)] and found.boxes["b.jpg"] == FOUND["b.jpg"]


@pytest.mark.parametrize("content", [b"", b"[]", b"[1", b'{"images": []}'])
def test_nothing_usable_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r'none of its \d lines can be used; expected one JSON object with "filename"'):
        read_all(read_odvg, path)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data sets are not in {DATA}")
def test_a_file_of_x_anylabeling() -> None:
    path = DATA / "xlabel_phrases" / "assets" / "ODVG" / "od.json"
    assert recognise_odvg(path) == 'ODVG lines with "filename" and "detection"'
    found = read_all(read_odvg, path)
    boxes = found.boxes["demo.jpg"]
    assert not found.problems and found.only.stated_size_px == (2592, 1944)
    assert sum(map(len, boxes.values())) == path.read_bytes().count(b'"bbox"') > 40
    assert boxes["bus"][0] == (250.73743057250977, 88.3039478302002, 642.3008560180665, 416.0265106201172)


def test_recognise(tmp_path: Path) -> None:
    assert recognise_odvg(write_lines(tmp_path / "x", [GROUNDING])) == 'ODVG lines with "filename" and "grounding"'
    array = write_json(tmp_path / "x.json", [DETECTION, GROUNDING])
    assert recognise_odvg(array) == 'ODVG lines with "filename" and "detection"'
    assert recognise_odvg(write_lines(tmp_path / "x", [{"filename": "a.jpg"}])) is None
    assert recognise_odvg(tmp_path) is None
