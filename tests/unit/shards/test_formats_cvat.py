"""CVAT's XML: every kind of shape, tracks, folders, and what is no such file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from case_files import CASES, build_case, write_photo
from format_files import Reading, read_all
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.formats import recognise_format
from cogvlm_ft.shards.formats.cvat import read_cvat, recognise_cvat

HEAD = '<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version><meta><task/></meta>'
DOG = '<box label="dog" xtl="1" ytl="2" xbr="21" ybr="12"/>'


def written(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{HEAD}{content}</annotations>", encoding="utf-8")
    return path


def photo(shapes: str, name: str = "a.jpg", more: str = "") -> str:
    return f'<image id="3" name="{name}" width="100" height="80" {more}>{shapes}</image>'


def read_shapes(tmp_path: Path, shapes: str) -> Reading:
    return read_all(read_cvat, written(tmp_path / "x.xml", photo(shapes)))


def test_13_the_file_and_the_folder(tmp_path: Path, capsys: Any) -> None:
    for i, path in enumerate(("in", "in/annotations.xml")):
        found = build_case(CASES / "13-cvat-xml" / path, tmp_path / str(i), capsys)
        assert list(found.boxes.values()) == [{"dog": ((1, 2, 21, 12),)}] and not found.reasons and not found.notes
        assert "--format cvat" in found.printed


SHAPES = {
    "box": ('<box label="x" xtl="1" ytl="2" xbr="21" ybr="12" rotation="0.0"/>', (1, 2, 21, 12)),
    "box turned by a quarter": (
        '<box label="x" xtl="10" ytl="20" xbr="50" ybr="30" rotation="90"/>',
        (25, 5, 35, 45),
    ),
    "box turned a little": (
        '<box label="x" xtl="10" ytl="20" xbr="50" ybr="30" rotation="30"/>',
        (10.179492, 10.669873, 49.820508, 39.330127),
    ),
    "polygon": ('<polygon label="x" points="5,6;30.5,7;20,40"/>', (5, 6, 30.5, 40)),
    "ellipse": ('<ellipse label="x" cx="50" cy="40" rx="20" ry="10"/>', (30, 30, 70, 50)),
    "ellipse upright": ('<ellipse label="x" cx="50" cy="40" rx="20" ry="10" rotation="90"/>', (40, 20, 60, 60)),
    "mask": ('<mask label="x" rle="2, 3" left="5" top="6" width="7" height="8"/>', (5, 6, 12, 14)),
    "cuboid": (
        '<cuboid label="x" xtl1="1" ytl1="2" xbl1="1" ybl1="30" xtr1="20" ytr1="3" xbr1="20" ybr1="33" xtl2="5" '
        'ytl2="1" xbl2="7" ybl2="8" xtr2="25" ytr2="3" xbr2="25" ybr2="30"/>',
        (1, 1, 25, 33),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_with_an_area(name: str, tmp_path: Path) -> None:
    shape, box = SHAPES[name]
    found = read_shapes(tmp_path, shape)
    assert found.only.targets[0].boxes_xyxy[0] == pytest.approx(box, abs=1e-5)
    assert found.only.stated_size_px == (100, 80)
    is_turned = "rotation" in shape and 'rotation="0.0"' not in shape
    assert found.reasons == [("note", "box_around_rotated")] * is_turned


LOST = {
    "points": ('<points label="x" points="1,2"/>', "no_area"),
    "line": ('<polyline label="x" points="1,2;3,4"/>', "no_area"),
    "skeleton": ('<skeleton label="x"><points label="y" points="1,2"/></skeleton>', "no_area"),
    "tag": ('<tag label="x"/>', "no_area"),
    "unknown": ('<blob label="x"/>', "unknown_shape"),
    "no label": ('<box xtl="1" ytl="2" xbr="3" ybr="4"/>', "empty_phrase"),
    "no corner": ('<box label="x" xtl="1" ytl="2" xbr="3"/>', "not_numeric"),
    "infinite angle": ('<box label="x" xtl="1" ytl="2" xbr="3" ybr="4" rotation="inf"/>', "bad_field"),
    "nan": ('<polygon label="x" points="1,2;nan,3;4,5"/>', "bad_field"),
    "two points": ('<polygon label="x" points="1,2;3,4"/>', "bad_field"),
}


@pytest.mark.parametrize("name", LOST)
def test_shapes_without_an_area_are_reported(name: str, tmp_path: Path) -> None:
    shape, reason = LOST[name]
    found = read_shapes(tmp_path, shape + DOG)
    assert found.boxes == {"a.jpg": {"dog": ((1, 2, 21, 12),)}}
    assert ("box", reason) in found.reasons and found.problems[0].source.startswith("image id 3 ")


def test_parts_of_a_group(tmp_path: Path) -> None:
    parts = "".join(
        f'<polygon label="{label}" points="{x},2;{x + 5},2;{x},9" group_id="{group}"/>'
        for label, group, x in (("cat", 1, 5), ("cat", 1, 30), ("dog", 1, 50), ("cat", 0, 60), ("cat", 0, 70))
    )
    found = read_shapes(tmp_path, parts)
    assert found.boxes["a.jpg"]["cat"] == ((5, 2, 35, 9), (60, 2, 65, 9), (70, 2, 75, 9))
    assert found.boxes["a.jpg"]["dog"] == ((50, 2, 55, 9),) and found.reasons == [("box", "joined_part")]


def test_tracks(tmp_path: Path) -> None:
    track = (
        '<track id="5" label="dog"><box frame="0" outside="0" xtl="1" ytl="2" xbr="21" ybr="12"/>'
        '<box frame="12" outside="0" xtl="3" ytl="4" xbr="23" ybr="14"/>'
        '<box frame="13" outside="1" xtl="3" ytl="4" xbr="23" ybr="14"/></track>'
        '<track id="6" label="cat"><box frame="12" outside="0" xtl="5" ytl="6" xbr="7" ybr="18"/></track>'
    )
    for name in ("images/frame_000000.PNG", "images/frame_000012.PNG", "images/frame_000013.PNG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    size = "<meta><task><original_size><width>100</width><height>80</height></original_size></task></meta>"
    found = read_all(read_cvat, written(tmp_path / "x.xml", track + size))
    assert found.boxes == {
        "images/frame_000000.PNG": {"dog": ((1, 2, 21, 12),)},
        "images/frame_000012.PNG": {"dog": ((3, 4, 23, 14),), "cat": ((5, 6, 7, 18),)},
        "images/frame_000013.PNG": {},
    }
    assert found.reasons == [("note", "outside")]
    assert {part.stated_size_px for part in found.candidates} == {(100, 80)}


def test_a_photo_listed_twice_and_one_without_a_name(tmp_path: Path) -> None:
    content = photo(DOG) + photo(DOG.replace("dog", "cat")) + photo(DOG, "").replace('id="3"', 'id="9"')
    found = read_all(read_cvat, written(tmp_path / "x.xml", content))
    assert found.boxes == {"a.jpg": {"dog": ((1, 2, 21, 12),)}}
    assert found.reasons == [("sample", "image_listed_again"), ("sample", "bad_field")]


@settings(max_examples=30, deadline=None)
@given(
    boxes=st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 30), st.integers(1, 55), st.integers(1, 45)),
        min_size=1,
        max_size=4,
    ),
    names=st.lists(st.sampled_from(["a.jpg", "sub/a.jpg", "狗/一.png", "b.jpg"]), min_size=1, max_size=4, unique=True),
    layout=st.sampled_from(["{name}", "images/{name}", "images/train/{name}", "default/{name}"]),
)
def test_boxes_come_to_their_photos(boxes: list[tuple[int, ...]], names: list[str], layout: str) -> None:
    corners: list[Box] = [(x, y, x + width, y + height) for x, y, width, height in boxes]
    shapes = "".join(
        f'<box label="猫" xtl="{x0}.0" ytl="{y0}" xbr="{x1}" ybr="{y1}.00"/>' for x0, y0, x1, y1 in corners
    )
    more = {"images/train/{name}": 'subset="train"', "default/{name}": 'subset="default"'}.get(layout, "")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = Path(folder, layout.format(name=name))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        file = written(Path(folder, "annotations.xml"), "".join(photo(shapes, name, more) for name in names))
        readings = [read_all(read_cvat, path, Path(folder)) for path in (file, Path(folder))]
        assert recognise_format(Path(folder))[0] == "cvat"
    for found in readings:
        assert found.boxes == {layout.format(name=name): {"猫": tuple(corners)} for name in names}
        assert not found.problems


@pytest.mark.parametrize(("stated", "written"), [("gb2312", "gbk"), ("utf-16", "utf-16"), ("utf-8", "gbk")])
def test_other_encodings(tmp_path: Path, stated: str, written: str) -> None:
    text = f"{HEAD.replace('utf-8', stated)}{photo(DOG.replace('dog', '红色卡车'))}</annotations>"
    (tmp_path / "x.xml").write_bytes(text.encode(written))
    assert recognise_cvat(tmp_path)
    found = read_all(read_cvat, tmp_path / "x.xml")
    assert found.boxes == {"a.jpg": {"红色卡车": ((1, 2, 21, 12),)}}
    assert found.reasons == ([("note", "encoding_guessed")] if stated == "utf-8" else [])


def test_frames_that_have_names_are_explained(tmp_path: Path, capsys: Any) -> None:
    write_photo(tmp_path / "in" / "x_01.jpg")
    shape = DOG.replace("/>", ' frame="0"/>')
    written(tmp_path / "in" / "x.xml", f'<track id="0" label="dog">{shape}</track>')
    built = build_case(tmp_path / "in", tmp_path / "out", capsys)
    assert built.code == 2 and "frame_000000" in built.printed and "Export CVAT for images" in built.printed


def test_damage_is_reported_and_what_comes_before_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.xml"
    path.write_text(HEAD + photo(DOG) + '<image id="4" name="b.jpg"><box label="d')
    found = read_all(read_cvat, path)
    assert found.boxes == {"a.jpg": {"dog": ((1, 2, 21, 12),)}} and found.reasons == [("sample", "bad_xml")]


@pytest.mark.parametrize(
    "text", ["<annotation><object/></annotation>", f"{HEAD}</annotations>", "<!DOCTYPE a><annotations/>"]
)
def test_other_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.xml"
    path.write_text(text)
    if "DOCTYPE" in text:
        assert read_all(read_cvat, path).reasons == [("sample", "bad_xml")]
        return
    with pytest.raises(DataError, match="expected"):
        read_all(read_cvat, path)


def test_voc_is_another_format(tmp_path: Path) -> None:
    (tmp_path / "x.xml").write_text("<annotation><object/></annotation>")
    assert recognise_cvat(tmp_path) is None and recognise_cvat(tmp_path / "x.xml") is None
    with pytest.raises(DataError, match=r"no CVAT \.xml file"):
        read_all(read_cvat, tmp_path)
