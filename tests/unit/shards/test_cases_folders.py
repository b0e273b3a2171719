"""YOLO, VOC and labelme as tools write them: columns, stale names, groups, encodings, and layouts of folders."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from case_files import CASES, build_case, write_photo
from format_files import Reading, read_all, write_json
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvlm_ft.shards.formats import recognise_format
from cogvlm_ft.shards.formats.labelme import read_labelme
from cogvlm_ft.shards.formats.voc import read_voc
from cogvlm_ft.shards.formats.yolo import read_yolo

BOX = (20, 20, 120, 80)
LAYOUT_BOX = (10, 16, 60, 64)
LAYOUTS = CASES / "30-layouts"
QUICK = settings(max_examples=30, deadline=None)


def test_01_the_box_of_a_pose_is_before_its_keypoints(tmp_path: Path, capsys: Any) -> None:
    found = build_case(CASES / "01-yolo-pose/in", tmp_path, capsys)
    assert list(found.boxes.values()) == [{"tiger": (BOX,)}] and found.reasons == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("02-yolo-predictions", "save_conf=True and track ids"),
        ("03-yolo-angle", "the sixth number is 1.5708: an angle"),
    ],
)
def test_02_03_lines_that_could_be_two_things_are_refused(tmp_path: Path, capsys: Any, name: str, words: str) -> None:
    found = build_case(CASES / name / "in", tmp_path, capsys)
    assert found.code == 2 and "ambiguous_columns" in found.printed and words in found.printed
    rows = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    num_lines = sum(len(path.read_text().split("\n")) - 1 for path in (CASES / name / "in/labels").iterdir())
    assert [row["reason"] for row in rows].count("ambiguous_columns") == num_lines


@pytest.mark.parametrize("name", ["04-voc-swapped", "05-labelme-swapped"])
def test_04_05_names_of_files_count(tmp_path: Path, capsys: Any, name: str) -> None:
    found = build_case(CASES / name / "in", tmp_path, capsys)
    assert found.boxes == {"a": {"red": ((10, 10, 40, 40),)}, "b": {"green": ((50, 30, 90, 70),)}}
    assert found.reasons == [] and found.noted == ["stale_image_name"] * 2
    assert "2 stale_image_name" in found.printed


def test_06_masks_of_one_group_are_one_object(tmp_path: Path, capsys: Any) -> None:
    found = build_case(CASES / "06-labelme-group-masks/in", tmp_path, capsys)
    assert found.boxes == {"a": {"dog": ((5, 5, 60, 40),)}} and found.reasons == ["joined_part"]


def test_12_names_of_data_yaml_come_first(tmp_path: Path, capsys: Any) -> None:
    found = build_case(CASES / "12-yolo-two-name-files/in", tmp_path, capsys)
    assert list(found.boxes.values()) == [{"helmet": (BOX,)}]
    assert found.noted == ["class_names", "class_names_differ"]
    assert "class 0 is 'dog' in labels/train/classes.txt and 'helmet' in data.yaml" in found.printed
    assert "data.yaml: 0 helmet, 1 vest" in found.printed


def test_12_names_of_a_list_beside_data_yaml_above_the_folder_are_an_error(tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(CASES / "12-yolo-two-name-files/in", tmp_path / "in")
    found = build_case(tmp_path / "in/labels", tmp_path / "out", capsys, "--images", str(tmp_path / "in/images"))
    assert found.code == 2 and "class 0 is 'dog' in train/classes.txt and 'helmet' in " in found.printed
    assert "data.yaml; expected the same names. Remove or correct the wrong file." in found.printed


def test_18_yaml_in_gbk_is_read(tmp_path: Path, capsys: Any) -> None:
    found = build_case(CASES / "18-yaml-gbk/in", tmp_path, capsys)
    assert list(found.boxes.values()) == [{"安全帽": (BOX,)}]
    assert found.noted == ["class_names", "encoding_guessed"]


def test_18_yaml_with_tabs_is_an_error_that_says_so(tmp_path: Path, capsys: Any) -> None:
    found = build_case(CASES / "18-yaml-tab/in", tmp_path, capsys)
    assert (
        found.code == 2
        and "data.yaml: not valid YAML" in found.printed
        and "line 3, column 1" in found.printed
        and "not tabs" in found.printed
    )


def test_20_new_shapes(tmp_path: Path, capsys: Any) -> None:
    found = build_case(CASES / "20-labelme-new-shapes/in", tmp_path, capsys)
    assert found.boxes == {"a": {"dog": ((10, 10, 60, 50),), "box": ((1, 1, 25, 25),)}} and found.reasons == []


def test_32_shapes_over_the_edge(tmp_path: Path, capsys: Any) -> None:
    found = build_case(CASES / "32-labelme-circle-edge/in", tmp_path, capsys)
    assert found.boxes == {"a": {"hole": ((0, 0, 40, 40),), "bolt": ((0, 10, 30, 50),)}} and found.reasons == []


def test_35_another_xml_comes_first(tmp_path: Path, capsys: Any) -> None:
    found = build_case(CASES / "35-first-xml/in", tmp_path, capsys)
    assert found.boxes == {name: {"dog": ((1, 2, 21, 12),)} for name in "bc"} and found.reasons == ["bad_xml"]


def test_37_a_size_with_decimals_is_compared(tmp_path: Path, capsys: Any) -> None:
    found = build_case(CASES / "37-voc-size-float/in", tmp_path, capsys)
    assert found.code == 2 and "size_mismatch: the annotation is for (50, 40)" in found.printed


@pytest.mark.parametrize(
    ("layout", "num_photos"),
    [
        ("a-ultralytics", 2),
        ("b-roboflow-yolo", 3),
        ("d-roboflow-voc", 2),
        ("e-vocdevkit", 1),
        ("g-cvat-yolo11", 2),
        ("j-cvat-ultralytics", 1),
        ("k-ls-yolo", 1),
        ("n-ls-voc", 1),
        ("o-xany", 2),
        ("p-labelme-two", 1),
        ("p2-labelme-abs", 1),
        ("p3-labelme-abs-json", 1),
        ("r-fiftyone-yolov5", 1),
        ("u-yolo-annotations-folder", 1),
        ("v-voc-xmls", 1),
        ("w-oxford-pets", 1),
    ],
)
def test_30_layouts(layout: str, num_photos: int) -> None:
    name, _ = recognise_format(LAYOUTS / layout)
    read = {"yolo": read_yolo, "voc": read_voc, "labelme": read_labelme}[name]
    found = read_all(read, LAYOUTS / layout, LAYOUTS / layout)
    assert len(found.candidates) == num_photos and all((LAYOUTS / layout / image).is_file() for image in found.boxes)
    whole = (100, 80, 100, 80) if name == "yolo" else (1, 1, 1, 1)
    for boxes in found.boxes.values():
        [(phrase, [box])] = boxes.items()
        assert phrase == "dog" and [a * b for a, b in zip(box, whole, strict=True)] == pytest.approx(LAYOUT_BOX)
    assert {problem.reason for problem in found.problems} <= {"class_names"}


@pytest.fixture
def yolo(tmp_path: Path) -> Iterator[Path]:
    """A data set with one photo of 200 x 100 px, and without labels."""
    write_photo(tmp_path / "images/a.png", (200, 100))
    (tmp_path / "labels").mkdir()
    (tmp_path / "data.yaml").write_text("names: [dog]\n")
    yield tmp_path


def read_lines(root: Path, *lines: str) -> Reading:
    (root / "labels/a.txt").write_text("\n".join(lines))
    found = read_all(read_yolo, root, root)
    return Reading(found.candidates, [problem for problem in found.problems if problem.reason != "class_names"])


def fractions(num: int, low: float = 0.05, high: float = 0.95) -> st.SearchStrategy[list[float]]:
    """Numbers as tools write coordinates, with decimals."""
    return st.lists(st.floats(low, high).map(lambda value: round(value, 4)), min_size=num, max_size=num)


def line(*columns: float) -> str:
    return "0 " + " ".join(f"{column:.6g}" for column in columns)


@QUICK
@given(st.integers(1, 17), st.sampled_from([2, 3]), st.data())
def test_keypoints_are_never_part_of_the_box(num_keypoints: int, num_values: int, data: st.DataObject) -> None:
    """With a confidence and a track id after them, as predictions have."""
    x, y, width, height = 0.35, 0.5, *data.draw(fractions(2, 0.1, 0.6))
    keypoints = data.draw(fractions(num_keypoints * num_values))
    more = data.draw(st.sampled_from([[], [0.9], [0.9, 3.0]]))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_photo(root / "images/a.png")
        (root / "labels").mkdir()
        (root / "data.yaml").write_text(f"names: [dog]\nkpt_shape: [{num_keypoints}, {num_values}]\n")
        found = read_lines(root, line(x, y, width, height, *keypoints, *more), line(x, y, width, height))
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        assert not found.problems
        assert found.boxes["images/a.png"]["dog"] == (pytest.approx(box, abs=1e-5),) * 2
        (root / "data.yaml").write_text("names: [dog]\n")  # the same without a word about keypoints
        found = read_lines(root, line(x, y, width, height, *keypoints, *more))
        if not found.problems:  # then only an outline can have been meant: its points are not in such a box
            assert (4 + len(keypoints) + len(more)) % 2 == 0


@pytest.mark.parametrize("more", ["0.9 1", "0.87 17", "1"])
@pytest.mark.parametrize("num_points", [3, 4, 7])
def test_outlines_with_trailing_values_are_refused(yolo: Path, num_points: int, more: str) -> None:
    points = [(0.5 + 0.3 * math.cos(i), 0.5 + 0.4 * math.sin(i)) for i in range(num_points)]
    text = line(*(side for point in points for side in point))
    found = read_lines(yolo, *[f"{text} {more}"] * 3)
    assert {problem.reason for problem in found.problems} == {"ambiguous_columns", "no_boxes_left"}
    assert "save_conf=True and track ids" in found.problems[0].detail


def test_one_odd_line_does_not_condemn_the_outlines_of_a_source(yolo: Path) -> None:
    square = "0 0.1 0.2 0.6 0.2 0.6 0.8 0.1 0.8"
    found = read_lines(yolo, square, f"{square} 0.5", "0 0.1 0.2 0.6 0.2 0.6 0.8 0.3 1", f"{square} 0.7 1", square)
    assert found.boxes["images/a.png"]["dog"][:1] == ((0.1, 0.2, 0.6, 0.8),) and len(found.problems) == 1
    found = read_lines(yolo, square, f"{square} 0.7 1", f"{square} 0.7 2", "0 0.1 0.2 0.6 0.2 0.6 0.8 0.3 1.0")
    assert found.boxes["images/a.png"]["dog"] == ((0.1, 0.2, 0.6, 0.8), (0.1, 0.2, 0.6, 1)) and len(found.problems) == 2


def test_one_angle_condemns_the_sixth_numbers_of_a_source(yolo: Path) -> None:
    found = read_lines(yolo, "0 0.5 0.5 0.2 0.1 0.3", "0 0.5 0.5 0.2 0.1 -0.4", "0 0.5 0.5 0.2 0.1")
    assert found.boxes["images/a.png"]["dog"] == (pytest.approx((0.4, 0.45, 0.6, 0.55)),)
    assert [problem.reason for problem in found.problems] == ["ambiguous_columns"] * 2


def test_three_points_are_an_outline_among_outlines(yolo: Path) -> None:
    triangle, square = "0 0.1 0.2 0.6 0.2 0.3 0.8", "0 0.1 0.2 0.6 0.2 0.6 0.8 0.1 0.8"
    assert read_lines(yolo, triangle).reasons[0] == ("box", "ambiguous_columns")
    assert read_lines(yolo, triangle, square).boxes["images/a.png"]["dog"] == ((0.1, 0.2, 0.6, 0.8),) * 2
    (yolo / "data.yaml").write_text("names: [dog]\ntask: segment\n")
    assert read_lines(yolo, triangle).boxes["images/a.png"]["dog"] == ((0.1, 0.2, 0.6, 0.8),)


def test_poses_without_kpt_shape_are_refused(yolo: Path) -> None:
    """Lines of one length whose numbers are a box and points in it."""
    poses = ["0 0.35 0.5 0.5 0.6 0.2 0.3 0.5 0.4 0.4 0.6 0.3 0.7", "0 0.5 0.4 0.2 0.2 0.45 0.35 0.5 0.4 0.52 0.45 0 0"]
    found = read_lines(yolo, *poses)
    assert [problem.reason for problem in found.problems][:2] == ["ambiguous_columns"] * 2
    assert "write kpt_shape into data.yaml" in found.problems[0].detail
    found = read_lines(yolo, "0 0.35 0.5 0.5 0.6 0.2 0.3 2 0.4 0.6 1")
    assert found.reasons[0] == ("box", "ambiguous_columns")


def test_a_nearer_data_yaml_that_differs_is_reported(yolo: Path) -> None:
    (yolo / "labels/old.yaml").write_text("names: [dog, cat]\n")
    assert not read_lines(yolo, line(0.5, 0.5, 0.2, 0.1)).problems
    (yolo / "labels/old.yaml").write_text("names: [cat]\n")
    found = read_lines(yolo, line(0.5, 0.5, 0.2, 0.1))
    assert found.reasons == [("note", "class_names_differ")] and found.boxes["images/a.png"].keys() == {"cat"}
    assert found.problems[0].detail.startswith("class 0 is 'dog' in data.yaml and 'cat' in labels/old.yaml; used")


def test_empty_labels_come_first(yolo: Path) -> None:
    for number in range(120):
        (yolo / f"labels/0{number}.txt").write_text("")
    read_lines(yolo, line(0.5, 0.5, 0.2, 0.1))
    assert recognise_format(yolo)[0] == "yolo"


@pytest.mark.parametrize("name", ["a.png.txt", "a.txt"])
def test_an_empty_label_is_a_photo_without_targets(yolo: Path, name: str) -> None:
    (yolo / "labels" / name).write_text("\n")
    found = read_all(read_yolo, yolo, yolo)
    assert found.boxes == {"images/a.png": {}} and [problem.reason for problem in found.problems] == ["class_names"]


@pytest.mark.parametrize("label", ["猫", "狗"])
def test_labelme_in_gbk(tmp_path: Path, label: str) -> None:
    shape = {"label": label, "points": [[1, 2], [30, 20]], "shape_type": "rectangle"}
    (tmp_path / "a.json").write_bytes(json.dumps({"shapes": [shape]}, ensure_ascii=False).encode("gbk"))
    found = read_all(read_labelme, tmp_path, tmp_path)
    assert found.boxes == {"a.jpg": {label: ((1, 2, 30, 20),)}} and found.reasons == [("note", "encoding_guessed")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names:\n\t0: dog\n", "line 2, column 1.*not tabs"),
        ("names: [dog\n", "line 2, column 1"),
        ("names: {0: dog, 0: cat}\n", "class 0 is 'dog' and 'cat'"),
        ("names: [dog]\nnames: [cat]\n", "names: is there twice"),
        ("names: [dog]\nkpt_shape: 17\n", r"kpt_shape: 17; expected \[number of keypoints, 2 or 3\]"),
        ("names: [dog]\nkpt_shape: [17, 4]\n", r"kpt_shape: \['17', '4'\]; expected"),
    ],
)
def test_a_data_yaml_that_cannot_be_read_is_an_error(yolo: Path, text: str, message: str) -> None:
    (yolo / "data.yaml").write_text(text)
    (yolo / "classes.txt").write_text("cat\n")  # not used instead without a word
    with pytest.raises(Exception, match=f"data.yaml: .*{message}"):
        read_lines(yolo, line(0.5, 0.5, 0.2, 0.1))


NAMES = st.lists(st.sampled_from(["red", "green", "blue", "dog 1", "狗", "x.y", "IMG_0001"]), min_size=2, unique=True)


def write_annotation(path: Path, kind: str, stated: str, label: str, box: tuple[float, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "voc":
        corners = "".join(f"<{n}>{v}</{n}>" for n, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        thing = f"<object><name>{label}</name><bndbox>{corners}</bndbox></object>"
        path.write_text(f"<annotation><filename>{Path(stated).name}</filename>{thing}</annotation>")
    else:
        shape = {"label": label, "points": [box[:2], box[2:]], "shape_type": "rectangle"}
        write_json(path, {"imagePath": stated, "imageData": None, "shapes": [shape]})


@QUICK
@given(
    NAMES, st.randoms(), st.sampled_from(["voc", "labelme"]), st.sampled_from(["", "../images/", "C:\\me\\"]), st.data()
)
def test_boxes_stay_on_their_photos_whatever_name_is_stated(
    names: list[str], rng: Any, kind: str, prefix: str, data: st.DataObject
) -> None:
    stated = names.copy()
    rng.shuffle(stated)
    folders = data.draw(
        st.sampled_from([("", ""), ("Annotations", "images"), ("s/xmls", "s/imgs"), ("json", "photos")])
    )
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / folders[1]).mkdir(parents=True, exist_ok=True)
        for i, (own, other) in enumerate(zip(names, stated, strict=True)):
            (root / folders[1] / f"{own}.jpg").write_bytes(b"")
            ending = "xml" if kind == "voc" else "json"
            write_annotation(root / folders[0] / f"{own}.{ending}", kind, f"{prefix}{other}.jpg", own, (i, 1, i + 9, 5))
        found = read_all(read_voc if kind == "voc" else read_labelme, root, root)
        assert {Path(image).stem: list(boxes) for image, boxes in found.boxes.items()} == {own: [own] for own in names}
        num_stale = sum(own != other for own, other in zip(names, stated, strict=True))
        assert found.reasons == [("note", "stale_image_name")] * num_stale


@pytest.mark.parametrize("kind", ["voc", "labelme"])
def test_no_photo_belongs_to_two_files(tmp_path: Path, kind: str) -> None:
    """Copies that state the name of the first: it owns its photo, and of two without a claim neither gets it."""
    for name in ("a.jpg", "b.jpg"):
        write_photo(tmp_path / name)
    for stem, stated in (("a", "a"), ("a copy", "a"), ("x", "b"), ("y", "b"), ("z", "gone"), ("w", "gone")):
        write_annotation(
            tmp_path / f"{stem}.{'xml' if kind == 'voc' else 'json'}", kind, f"{stated}.jpg", stem, (1, 2, 30, 20)
        )
    found = read_all(read_voc if kind == "voc" else read_labelme, tmp_path, tmp_path)
    assert found.boxes == {"a.jpg": {"a": ((1, 2, 30, 20),)}}
    assert found.reasons == [("sample", "image_claimed_twice")] * 5
    details = {Path(problem.source).stem: problem.detail for problem in found.problems}
    assert "'a.jpg' is also the image of 'a." in details["a copy"]
    assert "'y." in details["x"] and "'x." in details["y"] and "'w." in details["z"]


def test_files_of_one_name_in_two_folders_are_refused_both(tmp_path: Path) -> None:
    write_photo(tmp_path / "images/a.jpg")
    for folder in ("labels", "txt"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("0 0.5 0.5 0.2 0.1")
    (tmp_path / "classes.txt").write_text("dog")
    found = read_all(read_yolo, tmp_path, tmp_path)
    assert not found.candidates
    assert [(problem.reason, problem.source) for problem in found.problems if not problem.is_note] == [
        ("image_claimed_twice", "labels/a.txt"),
        ("image_claimed_twice", "txt/a.txt"),
    ]


def test_an_embedded_photo_belongs_to_its_file(tmp_path: Path) -> None:
    """A copy that states the photo of another file has its own photo in it."""
    write_photo(tmp_path / "a.jpg")
    for stem in ("a", "b"):
        write_annotation(tmp_path / f"{stem}.json", "labelme", "a.jpg", stem, (1, 2, 30, 20))
        content = json.loads((tmp_path / f"{stem}.json").read_text())
        write_json(tmp_path / f"{stem}.json", {**content, "imageData": "Zm9v"})
    found = read_all(read_labelme, tmp_path, tmp_path)
    assert {image: list(boxes) for image, boxes in found.boxes.items()} == {"a.jpg": ["a"], "b.jpg": ["b"]}


@pytest.mark.parametrize(
    ("label", "image"),
    [
        ("labels/train/a.txt", "images/val/a.jpg"),
        ("seq1/json/a.txt", "seq2/img/a.jpg"),
        ("labels/a.txt", "masks/a.png"),
    ],
)
def test_a_photo_of_another_folder_is_not_taken(tmp_path: Path, label: str, image: str) -> None:
    write_photo(tmp_path / image)
    (tmp_path / label).parent.mkdir(parents=True)
    (tmp_path / label).write_text("0 0.5 0.5 0.2 0.1")
    (tmp_path / "classes.txt").write_text("dog")
    assert read_all(read_yolo, tmp_path, tmp_path).only.image != image


@QUICK
@given(
    st.floats(30, 60),
    st.floats(20, 60),
    st.floats(4, 30),
    st.floats(4, 15),
    st.floats(-math.pi, math.pi),
    st.booleans(),
)
def test_rotated_boxes_become_the_box_around_them(
    x: float, y: float, width: float, height: float, angle: float, known: bool
) -> None:
    """As roLabelImg and as X-AnyLabeling write one box; both are cut at the edge if the size is stated."""
    cos, sin = math.cos(angle), math.sin(angle)
    ends = [(width / 2 * a, height / 2 * b) for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    points = [(x + dx * cos - dy * sin, y + dx * sin + dy * cos) for dx, dy in ends]
    xs, ys = zip(*points, strict=True)
    box = (min(xs), min(ys), max(xs), max(ys))
    if known:
        box = (max(box[0], 0), max(box[1], 0), min(box[2], 100), min(box[3], 80))
    values = "".join(
        f"<{n}>{v}</{n}>" for n, v in zip(("cx", "cy", "w", "h", "angle"), (x, y, width, height, angle), strict=True)
    )
    size = "<size><width>100</width><height>80</height></size>" if known else ""
    thing = f"<object><type>robndbox</type><name>dog</name><robndbox>{values}</robndbox></object>"
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "a.xml").write_text(f"<annotation>{size}{thing}</annotation>")
        found = [read_all(read_voc, root, root)]
        for kind in ("rotation", "oriented_rectangle", "cuboid"):
            shapes = [{"label": "dog", "points": points, "shape_type": kind, "direction": angle}]
            sides = {"imageWidth": 100, "imageHeight": "80.0"} if known else {}
            write_json(root / "a.json", {"imagePath": "a.jpg", "shapes": shapes, **sides})
            found.append(read_all(read_labelme, root, root))
    for reading in found:
        assert not reading.problems and reading.boxes["a.jpg"]["dog"] == (pytest.approx(box),)


def test_an_angle_in_degrees_is_refused(tmp_path: Path) -> None:
    values = "<cx>50</cx><cy>40</cy><w>20</w><h>10</h><angle>90</angle>"
    thing = f"<object><name>dog</name><robndbox>{values}</robndbox></object>"
    (tmp_path / "a.xml").write_text(f"<annotation>{thing}</annotation>")
    found = read_all(read_voc, tmp_path, tmp_path)
    assert "expected radians" in found.problems[0].detail and not found.only.targets


def test_two_boxes_in_one_object_are_refused(tmp_path: Path) -> None:
    corners = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>20</ymax></bndbox>"
    (tmp_path / "a.xml").write_text(f"<annotation><object><name>dog</name>{corners * 2}</object></annotation>")
    found = read_all(read_voc, tmp_path, tmp_path)
    assert "is there twice" in found.problems[0].detail and not found.only.targets


@QUICK
@given(st.sampled_from([50, 100, 200]), st.sampled_from([40, 80]), st.sampled_from(["{}", "{}.0", " {} ", "{}.000"]))
def test_sizes_in_every_spelling_are_compared(width: int, height: int, form: str) -> None:
    texts = form.format(width), form.format(height)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        size = f"<size><width>{texts[0]}</width><height>{texts[1]}</height></size>"
        (root / "a.xml").write_text(f"<annotation>{size}</annotation>")
        write_json(root / "a.json", {"imageWidth": texts[0], "imageHeight": float(height), "shapes": []})
        for read in (read_voc, read_labelme):
            assert read_all(read, root, root).only.stated_size_px == (width, height)


@QUICK
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([1, "1", 1.0, 0, None, "", " "])), min_size=1, max_size=8)
)
def test_shapes_of_one_label_and_group_are_one_object(shapes: list[tuple[str, Any]]) -> None:
    content = [
        {"label": label, "group_id": group, "points": [[i, 1], [i + 3, 5 + i]], "shape_type": "mask"}
        for i, (label, group) in enumerate(shapes)
    ]
    groups: dict[Any, list[int]] = {}
    for i, (label, group) in enumerate(shapes):
        none = group is None or not str(group).strip()
        groups.setdefault((label, i) if none else (label, "group", f"{float(group):g}"), []).append(i)
    expected = [(label[0], (min(at), 1, max(at) + 3, 5 + max(at))) for label, at in groups.items()]
    with tempfile.TemporaryDirectory() as name:
        found = read_all(read_labelme, write_json(Path(name) / "a.json", {"shapes": content}), Path(name))
    assert [(phrase, box) for phrase, boxes in next(iter(found.boxes.values())).items() for box in boxes] == sorted(
        expected, key=lambda one: [label for label, _ in expected].index(one[0])
    )
    assert found.reasons == [("box", "joined_part")] * (len(shapes) - len(groups))
