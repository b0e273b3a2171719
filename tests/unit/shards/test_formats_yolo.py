"""YOLO: lines of boxes and outlines, class names, and the images they belong to."""

from __future__ import annotations

from pathlib import Path

import pytest
from format_files import Reading, read_all

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.formats import yolo
from cogvlm_ft.shards.formats.yolo import read_yolo, recognise_yolo

NAMES = "dog\n红色的车\nno\n\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read(photos: Path, text: str) -> Reading:
    labels = photos.parent / "labels"
    write(labels / "classes.txt", NAMES)
    write(labels / "a.txt", text)
    return read_labels(labels, photos)


def read_labels(labels: Path, images: Path) -> Reading:
    """Everything but the note that says which file has the class names."""
    found = read_all(read_yolo, labels, images)
    return Reading(found.candidates, [problem for problem in found.problems if problem.reason != "class_names"])


def test_one_target_per_class_in_shares_of_the_image(photos: Path) -> None:
    found = read(photos, "1 0.5 0.5 0.5 0.25\n0\t0.25  0.25 0.5 0.5\r\n\n1 0.75 0.75 0.5 0.5\n")
    assert not found.problems and found.only.units == "unit" and found.only.image == "a.jpg"
    assert [(target.phrase, target.language, target.boxes_xyxy) for target in found.only.targets] == [
        ("红色的车", "zh", ((0.25, 0.375, 0.75, 0.625), (0.5, 0.5, 1, 1))),
        ("dog", "en", ((0, 0, 0.5, 0.5),)),
    ]


def test_a_confidence_is_ignored(photos: Path) -> None:
    found = read(photos, "0 0.5 0.5 0.5 0.25 0.87\n0.0 0.5 0.5 1 1\n0 0.5 0.5 0.5 0.5 1\n")
    assert found.boxes == {"a.jpg": {"dog": ((0.25, 0.375, 0.75, 0.625), (0, 0, 1, 1), (0.25, 0.25, 0.75, 0.75))}}
    assert found.reasons == [("note", "confidence_ignored")] and "2 boxes" in found.problems[0].detail


def test_an_outline_becomes_a_box(photos: Path) -> None:
    found = read(
        photos,
        "0 0.5 0.1 0.9 0.2 0.7 0.8\n"  # three points
        "0 0.1 0.1 0.2 0.1 0.2 0.3 0.1 0.3\n"  # the four corners of a turned box
        "0.0 0.5 0.5 1 1\n",
    )
    assert not found.problems
    assert found.boxes == {"a.jpg": {"dog": ((0.5, 0.1, 0.9, 0.8), (0.1, 0.1, 0.2, 0.3), (0, 0, 1, 1))}}


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
@pytest.mark.parametrize("num_lines", [2, 3])
def test_ends_of_lines(photos: Path, end: str, num_lines: int) -> None:
    """Two or three lines that are read as one would be an outline."""
    (photos.parent / "labels").mkdir()
    lines = ["0 0.25 0.25 0.5 0.5", "0 0.5 0.75 0.5 0.25", "0 0.5 0.5 1 1"][:num_lines]
    (photos.parent / "labels" / "a.txt").write_bytes(end.join(lines).encode())
    write(photos.parent / "labels" / "classes.txt", NAMES)
    assert recognise_yolo(photos.parent / "labels")
    boxes = ((0, 0, 0.5, 0.5), (0.25, 0.625, 0.75, 0.875), (0, 0, 1, 1))[:num_lines]
    assert read_labels(photos.parent / "labels", photos).boxes == {"a.jpg": {"dog": boxes}}


@pytest.mark.parametrize("text", ["", "\n\n", " \r\n"])
def test_an_empty_file_is_an_image_with_nothing_in_it(photos: Path, text: str) -> None:
    candidate = read(photos, text).only
    assert (candidate.image, candidate.targets, candidate.problems) == ("a.jpg", (), ())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("3 0.5 0.5 0.5 0.25", "unknown_class"),  # the names end with empty lines
        ("9 0.5 0.5 0.5 0.25", "unknown_class"),
        ("-1 0.5 0.5 0.5 0.25", "unknown_class"),
        ("0.5 0.5 0.5 0.5 0.25", "unknown_class"),
        ("nan 0.5 0.5 0.5 0.25", "unknown_class"),
        ("dog 0.5 0.5 0.5 0.25", "not_numeric"),
        ("0 0.5 x 0.5 0.25", "not_numeric"),
        ("0 0.5 nan 0.5 0.25", "not_finite"),
        ("0 1e308 0.5 1.7e308 0.25", "not_finite"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4 inf", "not_finite"),
        ("0 0.1 0.1 nan 0.2 0.3 0.3 0.4 0.4", "not_finite"),
        ("0", "wrong_number_of_coordinates"),
        ("0 0.5 0.5 0.5", "wrong_number_of_coordinates"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.9", "ambiguous_columns"),
        ("0 0.5 0.5 0.5 0.25 1.57", "ambiguous_columns"),
        ("0 0.5 0.5 0.5 0.25 0.9 3", "ambiguous_columns"),
    ],
)
def test_a_bad_line_is_lost_alone(photos: Path, line: str, reason: str) -> None:
    found = read(photos, f"0 0.5 0.5 1 1\n{line}\n0 0.25 0.25 0.5 0.5\n")
    assert found.boxes == {"a.jpg": {"dog": ((0, 0, 1, 1), (0, 0, 0.5, 0.5))}}
    assert found.reasons == [("box", reason)] and found.problems[0].source == "a.txt:2"


def test_a_class_that_loses_all_its_boxes_is_lost(photos: Path) -> None:
    found = read(photos, "1 0.5 0.5 0.5\n0 0.5 0.5 1 1\n")
    assert found.reasons == [("box", "wrong_number_of_coordinates"), ("target", "no_boxes_left")]
    assert found.boxes["a.jpg"].keys() == {"dog"}


@pytest.mark.parametrize("name", ["train.txt", "README.dataset.txt", "sub/readme.txt"])
def test_other_texts_of_an_export_are_no_labels(photos: Path, name: str) -> None:
    write(photos.parent / "labels" / name, "data/a.jpg\ndata/b.PNG\n" if name == "train.txt" else "# a data set\n")
    found = read(photos, "0 0.5 0.5 1 1\n")
    assert found.only.image == "a.jpg" and not found.problems


@pytest.mark.parametrize("text", ["./images/a.jpg\n./images/b.jpg\n", "\0\xff", "x"])
def test_a_text_that_has_no_boxes_is_lost_as_a_whole(photos: Path, text: str) -> None:
    found = read(photos, text)
    assert found.reasons == [("sample", "bad_file")] and not found.candidates


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("labels/sub/classes.txt", "\ufeffdog\r\ncat\r\n"),
        ("labels/classes.txt", "dog"),
        ("labels/obj.names", "dog\ncat\n\n"),
        ("obj.names", "dog\ncat\n"),
        ("data.yaml", "train: images\nnc: 2\nnames: [dog, cat]\n"),
        ("data.yml", "names:\n- dog\n- cat\n"),
        ("../config.yaml", "names:\n  0: dog\n  7: cat\n"),
    ],
)
def test_where_class_names_are(tmp_path: Path, path: str, text: str) -> None:
    labels = tmp_path / "set" / "labels"
    write(labels / "sub" / "a.txt", "0 0.5 0.5 1 1")
    write(tmp_path / "set" / path, text)
    assert read_all(read_yolo, labels, tmp_path).boxes == {"sub/a.jpg": {"dog": ((0, 0, 1, 1),)}}


def test_the_nearest_names_count(tmp_path: Path) -> None:
    write(tmp_path / "set" / "classes.txt", "far")
    write(tmp_path / "set" / "labels" / "unused.yaml", "names: 7")
    write(tmp_path / "set" / "labels" / "broken.yaml", "other: [dog\n")
    write(tmp_path / "set" / "labels" / "one" / "classes.txt", "near")
    for name in ("one/a.txt", "two/b.txt"):
        write(tmp_path / "set" / "labels" / name, "0 0.5 0.5 1 1")
    found = read_all(read_yolo, tmp_path / "set" / "labels", tmp_path)
    assert {image: list(boxes) for image, boxes in found.boxes.items()} == {"one/a.jpg": ["near"], "two/b.jpg": ["far"]}


def test_names_of_yaml_are_words(tmp_path: Path) -> None:
    write(tmp_path / "data.yaml", "names: {0: no, 1: 12, 2: [x], x: y, 3: on, " + "9" * 900 + ": z}")
    write(tmp_path / "a.txt", "".join(f"{i} 0.5 0.5 1 1\n" for i in range(4)))
    found = read_labels(tmp_path, tmp_path)
    assert list(found.boxes["a.jpg"]) == ["no", "12", "on"]
    assert found.reasons == [("box", "unknown_class")]


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes("dog\n狗\n".encode("gbk"))
    write(tmp_path / "a.txt", "1 0.5 0.5 1 1\n0 0.5 0.5 1 1")
    found = read_labels(tmp_path, tmp_path)
    assert found.boxes["a.jpg"].keys() == {"dog", "狗"} and found.reasons == [("note", "encoding_guessed")]
    (tmp_path / "classes.txt").write_bytes(b"dog\n\xff\xff\n")
    found = read_labels(tmp_path, tmp_path)
    assert found.boxes["a.jpg"].keys() == {"dog"} and found.reasons == [("target", "not_utf8")]


def test_without_names_nothing_can_be_read(tmp_path: Path) -> None:
    labels = tmp_path / "a" / "b" / "c" / "labels"
    write(tmp_path / "classes.txt", "too far above")
    write(labels / "a.txt", "0 0.5 0.5 1 1")
    with pytest.raises(
        DataError, match=r"no file of class names .*\*\.yaml, .*classes\.txt, \*\.names, .* there or above"
    ):
        read_all(read_yolo, labels, tmp_path)
    write(labels / "a.yaml", "names: [dog]")
    write(labels / "b.yaml", "names: [cat]")
    with pytest.raises(DataError, match=r"a\.yaml and b\.yaml with different class names"):
        read_all(read_yolo, labels, tmp_path)
    write(labels / "b.yaml", "names: {0: dog}")
    assert read_all(read_yolo, labels, tmp_path).boxes["a.jpg"].keys() == {"dog"}


def test_a_list_of_names_is_no_label_file_but_labels_of_a_photo_called_classes_are(tmp_path: Path) -> None:
    write(tmp_path / "obj.names", "dog")
    write(tmp_path / "classes.txt", "0 0.5 0.5 1 1")
    assert read_all(read_yolo, tmp_path, tmp_path).boxes.keys() == {"classes.jpg"}


@pytest.mark.parametrize(
    ("label", "image"),
    [
        ("a.txt", "a.JPG"),
        ("sub/a.txt", "sub/a.png"),
        ("labels/a.txt", "images/a.webp"),
        ("labels/train/a.txt", "images/train/a.jpeg"),
        ("train/labels/a.txt", "train/images/a.tif"),
        ("labels/train/a.txt", "train/a.bmp"),
        ("labels/a.txt", "a.jpg"),
        ("a.b.txt", "a.b.jpg"),
        ("狗.txt", "狗.jpg"),
    ],
)
def test_where_data_sets_keep_their_images(tmp_path: Path, label: str, image: str) -> None:
    write(tmp_path / "classes.txt", "dog")
    write(tmp_path / label, "0 0.5 0.5 1 1")
    write(tmp_path / image, "")
    write(tmp_path / Path(image).parent / "ab.jpg", "")
    assert read_all(read_yolo, tmp_path, tmp_path).only.image == image


def test_two_images_of_one_name_are_an_error_of_that_sample(photos: Path) -> None:
    write(photos / "a.png", "")
    write(photos.parent / "labels" / "b.txt", "0 0.5 0.5 1 1")
    found = read(photos, "0 0.5 0.5 1 1")
    assert found.reasons == [("sample", "ambiguous_image")] and found.problems[0].source == "a.txt"
    assert found.only.image == "b.jpg"


def test_a_file_that_is_too_large_or_elsewhere(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(photos.parent / "b.txt", "0 0.5 0.5 1 1")
    (photos.parent / "labels").mkdir()
    (photos.parent / "labels" / "b.txt").symlink_to(photos.parent / "b.txt")
    monkeypatch.setattr(yolo, "MAX_BYTES", 20)
    found = read(photos, "0 0.5 0.5 1 1\n" * 2)
    assert found.reasons == [("sample", "too_large"), ("sample", "path_outside_annotations")]


def test_recognise(tmp_path: Path) -> None:
    assert recognise_yolo(tmp_path) is None
    label = write(tmp_path / "labels" / "a.txt", "0 0.5 0.5 1 1\n")
    write(tmp_path / "labels" / "b.txt", "")
    assert recognise_yolo(tmp_path) == "2 .txt files with YOLO lines"
    assert recognise_yolo(label) is None
    with pytest.raises(DataError, match="is not a folder"):
        read_all(read_yolo, label)
    label.write_text("0 0.5 0.5 1\n")
    assert recognise_yolo(tmp_path) is None
    label.unlink()
    (tmp_path / "labels" / "b.txt").unlink()
    with pytest.raises(DataError, match=r"has no \.txt file"):
        read_all(read_yolo, tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("labels.txt", "cat\ndog\n", "found labels.txt; expected names:"),
        ("predefined_classes.txt", "cat\ndog\n", "found predefined_classes.txt"),
        ("notes.json", "{}", "found notes.json"),
        ("CLASSES.TXT", "cat\ndog\n", "found CLASSES.TXT"),
        ("data.yaml", "names: cat, dog\n", r"found data.yaml; expected names: \[cat, dog\]"),
        ("data.yaml", "names: {cat: 0, dog: 1}\n", "found data.yaml"),
    ],
)
def test_names_that_are_not_read_are_named(tmp_path: Path, name: str, text: str, found: str) -> None:
    write(tmp_path / "a.txt", "0 0.5 0.5 0.5 0.25\n")
    write(tmp_path / name, text)
    with pytest.raises(DataError, match=found):
        read_all(read_yolo, tmp_path)


def test_names_of_darknet_as_roboflow_writes_them(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a.txt", "1 0.5 0.5 0.5 0.25\n")
    write(tmp_path / "train" / "_darknet.labels", "cat\ndog")
    assert list(read_labels(tmp_path, tmp_path).boxes["train/a.jpg"]) == ["dog"]
