"""Files of converters and of tools' less usual options: what is read otherwise would be a wrong box or name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.formats.coco_bboxes import Bbox, check_sizes
from cogvlm_ft.shards.formats.encodings import decode_text
from cogvlm_ft.shards.packing.candidates import Rejected
from tests.unit.shards.case_files import Built, build_case, write_photo

_YAML = "names: [cat, dog]\n"


@pytest.fixture
def build(tmp_path: Path, capsys: Any) -> Any:
    """Build these files and a photo a.jpg of 100 x 80 pixels."""

    def run(files: dict[str, str], annotations: str = "", *options: str) -> Built:
        write_photo(tmp_path / "in" / "a.jpg")
        for name, text in files.items():
            (tmp_path / "in" / name).write_text(text)
        return build_case(tmp_path / "in" / annotations, tmp_path / "out", capsys, *options)

    return run


def _coco(*annotations: dict[str, Any], file_name: str = "a.jpg") -> dict[str, str]:
    content = {
        "images": [{"id": 1, "file_name": file_name, "width": 100, "height": 80}],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [{"image_id": 1, "category_id": 1, **annotation} for annotation in annotations],
    }
    return {"x.json": json.dumps(content)}


def test_rotated_boxes_of_cvat_in_coco(build: Any) -> None:
    rotated = {"bbox": [10, 20, 60, 20], "segmentation": [], "attributes": {"rotation": 90.0}}
    outlined = {"bbox": [1, 2, 30, 40], "segmentation": [[1, 2, 31, 2, 31, 42]], "attributes": {"rotation": 30.0}}
    of_user = {"bbox": [5, 6, 7, 8], "attributes": {"rotation": "left"}}
    built = build(_coco(rotated, outlined, of_user))
    assert built.boxes == {"a": {"dog": ((30, 0, 50, 60), (1, 2, 31, 42), (5, 6, 12, 14))}}
    assert built.noted == ["box_around_rotated"]


def test_rotated_boxes_of_cvat_in_voc(build: Any) -> None:
    attributes = "<attributes><attribute><name>{}</name><value>{}</value></attribute></attributes>"
    box = "<bndbox><xmin>10</xmin><ymin>20</ymin><xmax>70</xmax><ymax>40</ymax></bndbox>"
    objects = [f"<name>dog</name>{attributes.format(*pair)}{box}" for pair in (("rotation", "90.0"), ("age", "7"))]
    xml = f"<annotation>{''.join(f'<object>{found}</object>' for found in objects)}</annotation>"
    built = build({"a.xml": xml})
    assert built.boxes == {"a": {"dog": ((30, 0, 50, 60), (10, 20, 70, 40))}}
    assert built.noted == ["box_around_rotated"]


@pytest.mark.parametrize(
    ("annotations", "found"),
    [
        ([{"bbox": [10, 20, 50, 60]}, {"bbox": [60, 30, 90, 70]}, {"bbox": [5, 40, 80, 75]}], "2 of 3 boxes leave"),
        ([{"bbox": [10, 20, 50, 60], "area": 1600}], '"area" of 1 boxes'),
        ([{"bbox": [10, 20, 50, 60], "bbox_mode": 0}], "bbox_mode 0"),
        ([{"bbox": [10, 20, 50, 60], "segmentation": [[10, 20, 50, 20, 50, 60]]}], "outlines of 1 boxes"),
    ],
)
def test_corners_in_coco_are_refused(build: Any, annotations: list[dict[str, Any]], found: str) -> None:
    built = build(_coco(*annotations))
    assert built.code == 2 and found in built.printed


@given(st.lists(st.tuples(*[st.integers(0, 99)] * 4), min_size=3, max_size=30), st.booleans())
def test_sizes_are_never_taken_for_corners(boxes: list[tuple[int, int, int, int]], with_area: bool) -> None:
    """Boxes inside their photos are sizes, whatever the area of their outlines is; the same as corners are not."""
    inside = [(x, y, 1 + w % (100 - x), 1 + h % (100 - y)) for x, y, w, h in boxes]
    sizes = [Bbox(box, (100, 100), box[2] * box[3] if with_area else None, None) for box in inside]
    check_sizes(sizes, Path("x.json"))
    corners = [Bbox((x, y, x + w, y + h), (100, 100), w * h, None) for x, y, w, h in [*inside, (60, 60, 30, 20)]]
    with pytest.raises(DataError, match="every bbox seems to be"):
        check_sizes(corners, Path("x.json"))


def test_an_address_with_a_query_is_the_photo(build: Any) -> None:
    built = build(_coco({"bbox": [1, 2, 3, 4]}, file_name="https://host/set/%61.jpg?sig=1.2"))
    assert built.boxes == {"a": {"dog": ((1, 2, 4, 6),)}}


@pytest.mark.parametrize(
    ("lines", "yaml", "found"),
    [
        ("1 0.93 0.5 0.5 0.2 0.4\n0 0.8 0.3 0.3 0.2 0.2\n", _YAML, "seems to be a confidence"),
        ("1 0.5 0.5 0.2 0.4 0.3\n", _YAML + "task: obb\n", "a box with an angle"),
        ("1 50 40 20 40\n", _YAML, "Divide pixels"),
        ("1 10 10 50 10 50 60 10 60\n", _YAML, "Divide pixels"),
    ],
)
def test_other_columns_of_yolo(build: Any, lines: str, yaml: str, found: str) -> None:
    built = build({"a.txt": lines, "data.yaml": yaml})
    assert built.code == 2 and found in built.printed


@pytest.mark.parametrize(
    ("names", "result"),
    [
        ("0 cat\n1 dog\n", "dog"),
        ("0: cat\n1: dog\n\n", "dog"),
        ("2 door\n4 door\n", "4 door"),
        ("1 cat\n2 dog\n", "numbered from 1"),
        ("\ncat\ndog\n", "line 1 is empty"),
    ],
)
def test_lists_of_class_names(build: Any, names: str, result: str) -> None:
    built = build({"a.txt": "1 0.5 0.5 0.2 0.5\n", "classes.txt": names})
    assert built.boxes == {"a": {result: ((40, 20, 60, 60),)}} if built.code == 0 else result in built.printed


@pytest.mark.parametrize(
    "text",
    [
        "image,xmin,ymin,xmax,ymax,class,name\na.jpg,10.5,20,50,60,0,dog\n",
        "image;left;top;right;bottom;label\na.jpg;10,5;20;50;60;dog\n",
    ],
)
def test_csv_of_predictions_and_with_decimal_commas(build: Any, text: str) -> None:
    assert build({"x.csv": text}, "x.csv").boxes == {"a": {"dog": ((10.5, 20, 50, 60),)}}


_DOG = {"phrase": "dog", "boxes": [[10, 20, 50, 60]]}


@pytest.mark.parametrize(
    ("targets", "reasons"),
    [
        ([_DOG | {"format": "xywh"}], ["bad_field"]),
        ([_DOG | {"boxes_xyxy": [[1, 2, 3, 4]]}], ["bad_field"]),
        ([_DOG, {"phrase": "dog", "boxes": []}], ["contradiction"]),
        ([{"phrase": "dog", "boxes": [[10, 20, 500, 60]]}, {"phrase": "dog", "boxes": []}], ["contradiction"]),
    ],
)
def test_targets_that_contradict_themselves(build: Any, targets: list[dict[str, Any]], reasons: list[str]) -> None:
    cat = {"phrase": "cat", "boxes": [[1, 2, 3, 4]], "format": "xyxy"}
    built = build({"x.jsonl": json.dumps({"image": "a.jpg", "targets": [cat, *targets]})}, "x.jsonl")
    assert built.boxes == {"a": {"cat": ((1, 2, 3, 4),)}}
    assert set(reasons) <= set(built.reasons)


def test_boxes_for_another_size_in_swift(build: Any) -> None:
    objects = {"ref": ["dog"], "bbox": [[10, 20, 50, 60]], "width": [200], "height": [160]}
    messages = [{"role": "user", "content": "<image>Find <ref-object>"}, {"role": "assistant", "content": "<bbox>"}]
    row = {"messages": messages, "images": ["a.jpg"], "objects": objects}
    built = build({"x.jsonl": json.dumps(row)}, "x.jsonl")
    assert built.code == 2 and "size_mismatch" in built.printed


def test_an_unknown_folder_shows_its_annotations(build: Any) -> None:
    built = build({"a.txt": "dog 0.5 0.5 0.2 0.5\n", "data.yaml": _YAML})
    assert built.code == 2 and "a.txt begins with b'dog 0.5" in built.printed


_SIZES = [[70, 50, 20, 20], [60, 10, 30, 60], [5, 5, 60, 50]]


def test_sizes_where_corners_are_expected_are_refused(build: Any) -> None:
    """Two of three boxes are inverted as corners; the third one would be a wrong box."""
    lines = [json.dumps({"image": "a.jpg", "targets": [{"phrase": "dog", "boxes": _SIZES}]})]
    built = build({"x.jsonl": "\n".join(lines)}, "x.jsonl")
    assert built.code == 2 and "2 of 3 are not possible as corners" in built.printed
    built = build({"y.csv": "image,xmin,ymin,xmax,ymax,class\na.jpg,5,5,60,50,dog\na.jpg,70,50,99,1,dog\n"}, "y.csv")
    assert built.boxes == {"a": {"dog": ((5, 5, 60, 50),)}} and built.reasons == ["inverted_box"]


@pytest.mark.parametrize("word", ["Mädchen", "école", "Größe", "grüne Äpfel"])
def test_latin_is_not_read_as_chinese(word: str) -> None:
    with pytest.raises(Rejected, match="Latin-1"):
        decode_text(f"<name>{word}</name>".encode("latin-1"))


@pytest.mark.parametrize("word", ["狗", "镕", "堃", "綠燈", "person狗", "车 car"])
def test_rare_and_mixed_words_of_gbk(word: str) -> None:
    assert decode_text(f"<name>{word}</name>".encode("gbk")).text == f"<name>{word}</name>"
