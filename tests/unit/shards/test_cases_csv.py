"""CSV files of tools: other columns, none, other encodings, fractions, folders."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from case_files import CASES, build_case
from format_files import Reading, read_all
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.formats import recognise_format
from cogvlm_ft.shards.formats.csv_boxes import read_csv_boxes, recognise_csv_boxes

FILES = {
    "makesense.csv": ("dog", (1, 2, 21, 12), []),
    "retina.csv": ("dog", (1, 2, 21, 12), []),
    "gbk.csv": ("狗", (1, 2, 21, 12), ["encoding_guessed"]),
    "utf16.csv": ("狗", (1, 2, 21, 12), []),
    "norm.csv": ("dog", (1, 1.6, 21, 11.2), ["box_unit_inferred"]),
}


@pytest.mark.parametrize("name", FILES)
def test_26_files_of_tools(tmp_path: Path, capsys: Any, name: str) -> None:
    phrase, box, notes = FILES[name]
    found = build_case(CASES / "26-csv/in" / name, tmp_path, capsys)
    assert found.boxes == {"a": {phrase: (box,)}} and found.reasons == [] and found.noted == notes


def test_26_files_that_are_refused(tmp_path: Path, capsys: Any) -> None:
    found = build_case(CASES / "26-csv/in/via.csv", tmp_path, capsys)
    assert found.code == 2 and "VIA's CSV" in found.printed and "COCO" in found.printed
    found = build_case(CASES / "26-csv/in/openimages.csv", tmp_path, capsys)
    assert found.code == 2 and "expected OpenImages' class-descriptions-boxable.csv" in found.printed
    path = tmp_path / "x.csv"
    for head, missing in (
        ("photo,x,y,w,h,label", "image"),
        ("image,x,y,label", "box"),
        ("image,x0,y0,x1,y1", "phrase"),
    ):
        path.write_text(f"{head}\n1,2,3,4,5\n")
        found = build_case(path, tmp_path, capsys)
        assert found.code == 2 and f"none for the {missing}" in found.printed and head.split(",")[0] in found.printed


def test_30_roboflow(tmp_path: Path, capsys: Any) -> None:
    found = build_case(CASES / "30-layouts/zb-roboflow-csv", tmp_path, capsys)
    assert list(found.boxes.values()) == [{"dog": ((10, 16, 60, 64),)}] and found.reasons == []


def test_openimages(tmp_path: Path) -> None:
    head = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsGroupOf\n"
    rows = "a,x,/m/1,1,0.1,0.3,0.2,0.4,0\na,x,/m/1,1,0.5,0.6,0.7,0.9,1\na,x,/m/2,1,0,1,0,1,0\nb,x,/m/3,1,0,1,0,1,0\n"
    (tmp_path / "x.csv").write_text(head + rows)
    (tmp_path / "oidv7-class-descriptions-boxable.csv").write_text("LabelName,DisplayName\n/m/1,Dog\n/m/2,Cat\n")
    (tmp_path / "a.jpg").touch()
    found = read_all(read_csv_boxes, tmp_path / "x.csv")
    assert found.boxes == {"a.jpg": {"Dog": ((0.1, 0.2, 0.3, 0.4),), "Cat": ((0, 0, 1, 1),)}, "b": {}}
    assert {part.units for part in found.candidates} == {"unit"}
    assert found.reasons == [("box", "crowd"), ("target", "unknown_code")]


def read_text(text: str, encoding: str = "utf-8") -> Reading:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.csv")
        path.write_bytes(text.encode(encoding))
        assert recognise_csv_boxes(path) and recognise_format(path)[0] == "csv"
        return read_all(read_csv_boxes, path)


HEADS = {
    "corners": ("image,left,top,right,bottom,label", "{name},{x},{y},{right},{bottom},{label}"),
    "sizes": ("label,X,Y,W,H,file", "{label},{x},{y},{width},{height},{name}"),
    "box sizes": ("x,y,width,height,filename,class", "{x},{y},{width},{height},{name},{label}"),
    "makesense": (
        "label_name,bbox_x,bbox_y,bbox_width,bbox_height,image_name,image_width,image_height",
        "{label},{x},{y},{width},{height},{name},100,80",
    ),
    "makesense without head": (None, "{label},{x},{y},{width},{height},{name},100,80"),
    "retinanet": (None, "{name},{x},{y},{right},{bottom},{label}"),
}


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(sorted(HEADS)),
    boxes=st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 30), st.integers(2, 55), st.integers(2, 45)),
        min_size=1,
        max_size=4,
    ),
    names=st.permutations(["a.jpg", "sub/b.png", "照片.jpg"]),
    label=st.sampled_from(["dog", "狗", "红细胞", "消防栓"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "gbk", "utf-16"]),
    delimiter=st.sampled_from(",;\t"),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_columns_and_encodings(
    kind: str, boxes: list[tuple[int, ...]], names: list[str], label: str, encoding: str, delimiter: str, end: str
) -> None:
    head, row = HEADS[kind]
    lines = [head] if head else []
    expected: dict[str, dict[str, tuple[tuple[int, ...], ...]]] = {}
    for i, (x, y, width, height) in enumerate(boxes):
        name, right, bottom = names[i % len(names)], x + width, y + height
        lines.append(
            row.format(name=name, x=x, y=y, width=width, height=height, right=right, bottom=bottom, label=label)
        )
        former = expected.get(name, {}).get(label, ())
        expected[name] = {label: (*former, (x, y, right, bottom))}
    found = read_text(end.join(lines).replace(",", delimiter), encoding)
    assert found.boxes == expected
    assert all(problem.reason == "encoding_guessed" for problem in found.problems)
    if "makesense" in kind:
        assert {part.stated_size_px for part in found.candidates} == {(100, 80)}


def test_an_image_without_objects_of_retinanet(tmp_path: Path) -> None:
    found = read_text("a.jpg,,,,,\nb.jpg,1,2,3,4,dog\n")
    assert found.boxes == {"a.jpg": {}, "b.jpg": {"dog": ((1, 2, 3, 4),)}} and not found.problems


def test_damaged_utf8_is_not_taken_for_gbk() -> None:
    lines = ["image,x0,y0,x1,y1,label", "a.jpg,1,2,3,4,狗", "b.jpg,1,2,3,4,"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.csv")
        path.write_bytes("\n".join(lines).encode() + "狗".encode("gbk"))
        found = read_all(read_csv_boxes, path)
        assert found.boxes == {"a.jpg": {"狗": ((1, 2, 3, 4),)}} and found.reasons == [("target", "not_utf8")]
        path.write_bytes("\n".join([lines[0], "a.jpg,1,2,3,4,caf"]).encode() + b"\xe9s\n")
        assert read_all(read_csv_boxes, path).reasons == [("target", "not_utf8")]


def test_a_folder_without_such_a_file(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("image,x0,y0,x1,y1,label\n")
    assert recognise_csv_boxes(tmp_path) is None
    with pytest.raises(DataError, match=r"no _annotations\.csv"):
        read_all(read_csv_boxes, tmp_path)


VERTEX = """TRAINING,gs://b/x/a.jpg,dog,0.1,0.2,,,0.3,0.4,,
gs://b/x/a.jpg,cat,0.5,0.5,0.7,0.5,0.7,0.9,0.5,0.9
validation,gs://b/y/a.jpg,dog,.3,.4,,,.1,.2,,
TEST,gs://b/c.jpg,,,,,,,,,
UNASSIGNED,gs://b/d.jpg
"""


def test_vertex(tmp_path: Path) -> None:
    """Photos of one name in two folders stay apart; two corners are opposite ones in either order."""
    path = tmp_path / "x.csv"
    path.write_text(VERTEX)
    assert recognise_format(path)[0] == "csv"
    found = read_all(read_csv_boxes, path)
    assert not found.problems and [part.split for part in found.candidates] == ["train", "val", "test", None]
    assert found.boxes == {
        "x/a.jpg": {"dog": ((0.1, 0.2, 0.3, 0.4),), "cat": ((0.5, 0.5, 0.7, 0.9),)},
        "y/a.jpg": {"dog": ((0.1, 0.2, 0.3, 0.4),)},
        "c.jpg": {},
        "d.jpg": {},
    }
    assert {part.units for part in found.candidates} == {"unit"}
    with pytest.raises(DataError, match=r"found Vertex AI's CSV.* Pass this file itself"):
        recognise_format(tmp_path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("TRAIN,gs://b/a.jpg,dog,0.1,0.2,0.3,0.4,,,,", "ambiguous_box"),
        ("TRAIN,gs://b/a.jpg,dog,0.1,0.2,0.4,0.3,0.3,0.5,0.1,0.4", "ambiguous_box"),
        ("TRAIN,gs://b/a.jpg,dog,0.1,x,,,0.3,0.4,,", "not_numeric"),
        ("TRAIN,gs://b/a.jpg,dog", "wrong_number_of_columns"),
        ("DEV,gs://b/a.jpg,dog,0.1,0.2,,,0.3,0.4,,", "bad_field"),
        ("TRAIN,gs://b/a.jpg,,0.1,0.2,,,0.3,0.4,,", "empty_phrase"),
    ],
)
def test_vertex_lines_that_are_unclear_are_lost_alone(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f"{VERTEX}{line}\n")
    found = read_all(read_csv_boxes, path)
    assert [problem.reason for problem in found.problems] == [reason] and len(found.candidates[0].targets) == 2
