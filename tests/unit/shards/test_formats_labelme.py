"""labelme and X-AnyLabeling: shapes, phrases, and where the image is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from format_files import Reading, read_all, write_json

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.formats.labelme import read_labelme, recognise_labelme

TWO = [[30, 2], [1, 20]]
FOUR = [[1, 2], [30, 2], [30, 20], [1, 20]]


def shape(label: Any = "dog", points: Any = TWO, kind: Any = "rectangle", **fields: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind, "flags": {}, **fields}


def content(*shapes: Any, **fields: Any) -> dict[str, Any]:
    given = {"version": "4.0.0", "shapes": list(shapes), "imagePath": "a.jpg", "imageData": None}
    return {**given, "imageWidth": 40, "imageHeight": 30, **fields}


def read(photos: Path, *shapes: Any, **fields: Any) -> Reading:
    return read_all(read_labelme, write_json(photos.parent / "json" / "a.json", content(*shapes, **fields)), photos)


@pytest.mark.parametrize(
    ("points", "kind", "box"),
    [
        (TWO, "rectangle", (1, 2, 30, 20)),
        (TWO[::-1], "rectangle", (1, 2, 30, 20)),
        ([[1, 20], [30, 2]], "rectangle", (1, 2, 30, 20)),
        (FOUR, "rectangle", (1, 2, 30, 20)),
        (FOUR[2:] + FOUR[:2], "rectangle", (1, 2, 30, 20)),
        ([[5.5, 1], [9, 4], [2, 8.25]], "polygon", (2, 1, 9, 8.25)),
        ([[5, 1], [9, 4], [2, 8]], None, (2, 1, 9, 8)),
        ([[10, 1], [19, 10], [10, 19], [1, 10]], "rotation", (1, 1, 19, 19)),
        ([[10, 10], [13, 14]], "circle", (5, 5, 15, 15)),
        ([[1, 2], [30, 20]], "mask", (1, 2, 30, 20)),
    ],
)
def test_shapes_become_boxes(photos: Path, points: Any, kind: Any, box: Any) -> None:
    found = read(photos, shape(points=points, kind=kind))
    assert found.boxes == {"a.jpg": {"dog": (box,)}} and not found.problems
    assert found.only.stated_size_px == (40, 30) and found.only.embedded_in is None


def test_a_shape_without_a_type_is_a_polygon(photos: Path) -> None:
    assert read(photos, {"label": "dog", "points": FOUR}).boxes == {"a.jpg": {"dog": ((1, 2, 30, 20),)}}


@pytest.mark.parametrize(
    ("label", "description", "phrase"),
    [
        ("dog", None, "dog"),
        ("dog", "", "dog"),
        ("dog", " \n", "dog"),
        ("dog", 7, "dog"),
        ("text", "受理时间:", "受理时间:"),
        ("tag", "armchair | lamp\n扶手椅  | 灯 ", "armchair | lamp 扶手椅 | 灯"),
        ("a\nb ", None, "a b"),
        ("", "the dog", "the dog"),
    ],
)
def test_the_phrase_is_the_description_or_else_the_label(
    photos: Path, label: str, description: Any, phrase: str
) -> None:
    found = read(photos, shape(label, description=description))
    assert [target.phrase for target in found.only.targets] == [phrase] and not found.problems
    assert found.only.targets[0].language == ("zh" if "扶" in phrase or "受" in phrase else "en")


def test_shapes_of_one_phrase_are_one_target(photos: Path) -> None:
    found = read(photos, shape("b"), shape("a", FOUR), shape("b", [[3, 3], [4, 4]]), shape("x", description="b"))
    boxes = {"b": ((1, 2, 30, 20), (3, 3, 4, 4), (1, 2, 30, 20)), "a": ((1, 2, 30, 20),)}
    assert found.boxes == {"a.jpg": boxes} and list(found.boxes["a.jpg"]) == ["b", "a"]


def test_shapes_of_one_group_are_one_object(photos: Path) -> None:
    def part(x: int, group: Any, label: str = "sofa", kind: str = "polygon") -> dict[str, Any]:
        return shape(label, [[x, 2], [x + 3, 2], [x, x]], kind, group_id=group)

    found = read(
        photos, part(5, 0), part(10, None), part(20, 0), part(7, 1), part(9, 0, "cat"), part(3, 0), part(11, 1)
    )
    sofas = ((3, 2, 23, 20), (10, 2, 13, 10), (7, 2, 14, 11))
    assert found.boxes == {"a.jpg": {"sofa": sofas, "cat": ((9, 2, 12, 9),)}}
    assert found.reasons == [("box", "joined_part")] * 3
    found = read(photos, part(5, "x"), part(10, " x ", kind="rectangle"), part(20, ""), part(25, " "), part(30, True))
    assert found.boxes["a.jpg"]["sofa"] == ((5, 2, 13, 10), (20, 2, 23, 20), (25, 2, 28, 25), (30, 2, 33, 30))
    assert found.reasons == [("box", "joined_part")]


def test_shapes_of_one_group_with_other_texts_are_several_objects(photos: Path) -> None:
    """OCR tools write the text as the description, and link a question and its answers by a group."""
    texts = ("Name:", "Li", None, "Name:")
    found = read(photos, *(shape("text", description=text, group_id=1) for text in texts))
    assert [target.phrase for target in found.only.targets] == ["Name:", "Li"]
    assert found.reasons == [("box", "joined_part")] * 2
    found = read(photos, shape("dog", group_id=1), shape("dog", FOUR, description="the left dog", group_id=1))
    assert [target.phrase for target in found.only.targets] == ["the left dog"]


def test_a_part_that_cannot_be_used_does_not_take_its_group_with_it(photos: Path) -> None:
    parts = [shape("sofa", points, "polygon", group_id=0) for points in ([[1, 1]], FOUR, [[1, None]] * 3)]
    found = read(photos, *parts, shape())
    assert found.boxes["a.jpg"]["sofa"] == ((1, 2, 30, 20),)
    assert found.reasons == [("box", "wrong_number_of_coordinates"), ("box", "bad_field")]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (shape(points=[[1, 2]], kind="point"), "no_area"),
        (shape(kind="line"), "no_area"),
        (shape(points=FOUR, kind="linestrip"), "no_area"),
        (shape(kind=["rectangle"]), "bad_field"),
        (shape(kind=7), "bad_field"),
        (shape("__ignore__"), "ignored_label"),
        (shape("_background_", description="wall"), "ignored_label"),
        (shape(points=[[1, 2]]), "wrong_number_of_coordinates"),
        (shape(points=TWO, kind="polygon"), "wrong_number_of_coordinates"),
        (shape(points=FOUR, kind="circle"), "wrong_number_of_coordinates"),
        (shape(points=[]), "wrong_number_of_coordinates"),
        (shape(points=None), "bad_field"),
        (shape(points=[[1, 2], [3]]), "bad_field"),
        (shape(points=[[1, 2], [3, "4"]]), "bad_field"),
        (shape(points=[[1, 2], [3, float("nan")]]), "bad_field"),
        (shape(points=[[0, 0], [1e308, 1.7e308]], kind="circle"), "not_finite"),
        (shape(None), "bad_field"),
        (shape(" "), "empty_phrase"),
        ("dog", "bad_field"),
    ],
)
def test_a_bad_shape_is_lost_alone(photos: Path, bad: Any, reason: str) -> None:
    found = read(photos, shape(), bad)
    assert found.boxes == {"a.jpg": {"dog": ((1, 2, 30, 20),)}}
    assert [problem.reason for problem in found.problems] == [reason]
    assert found.problems[0].source == "a.json shapes[1]"


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "bad_json"),
        (b"a.jpg\t[]\n", "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b"[]", "bad_field"),
        (b'{"imagePath": "a.jpg"}', "bad_field"),
        (b'{"shapes": {}}', "bad_field"),
        (b'{"shapes": [{"label": "\xff\xff"}]}', "not_utf8"),
    ],
)
def test_a_bad_file_is_lost_alone(photos: Path, raw: bytes, reason: str) -> None:
    folder = photos.parent / "json"
    write_json(folder / "b.json", content(shape(), imagePath="b.jpg"))
    (folder / "a.json").write_bytes(raw)
    found = read_all(read_labelme, folder, photos)
    assert found.reasons == [("sample", reason)] and found.problems[0].source == "a.json"
    assert found.only.image == "b.jpg"


@pytest.mark.parametrize(
    "path", ["a.jpg", "../photos/a.jpg", "..\\photos\\a.jpg", "C:\\my\\a.jpg", "/x/a.jpg", "a.json", "", None, 7, "\0"]
)
def test_the_image_is_found_by_its_path_its_name_or_that_of_the_json(photos: Path, path: Any) -> None:
    assert read(photos, shape(), imagePath=path).only.image == "a.jpg"


def test_a_path_is_relative_to_the_json(tmp_path: Path) -> None:
    for name in ("sub/a.jpg", "a.jpg", "other/a.jpg"):
        write_json(tmp_path / name, {})
    write_json(tmp_path / "sub" / "a.json", content(shape()))
    write_json(tmp_path / "sub" / "b.json", content(shape(), imagePath="../other/a.jpg"))
    write_json(tmp_path / "sub" / "c.json", content(shape(), imagePath="../a.jpg"))
    images = [candidate.image for candidate in read_all(read_labelme, tmp_path, tmp_path).candidates]
    assert images == ["sub/a.jpg", "other/a.jpg", "a.jpg"]


def test_an_image_outside_the_images_folder_is_not_looked_at(tmp_path: Path) -> None:
    write_json(tmp_path / "a.jpg", {})
    (tmp_path / "images").mkdir()
    path = write_json(tmp_path / "a.json", content(shape()))
    assert read_all(read_labelme, path, tmp_path / "images").only.image == "a.jpg"  # missing there
    write_json(tmp_path / "images" / "a.png", {})
    assert read_all(read_labelme, path, tmp_path / "images").only.image == "a.png"


def test_an_image_that_is_nowhere_may_be_in_the_json(photos: Path) -> None:
    (photos / "a.jpg").unlink()
    found = read(photos, shape(), imageData="Zm9v", imagePath="x/gone.png")
    assert found.only.image == "a.png" and not found.problems
    assert found.only.embedded_in == photos.parent / "json" / "a.json"
    assert read(photos, shape(), imageData="").only.embedded_in is None
    assert read(photos, shape(), imagePath=None).only.image == "a.jpg"


@pytest.mark.parametrize("size", [{"imageWidth": None}, {"imageHeight": 0}, {"imageHeight": ""}])
def test_a_size_may_be_unknown(photos: Path, size: dict[str, Any]) -> None:
    assert read(photos, shape(), **size).only.stated_size_px is None


@pytest.mark.parametrize("height", ["30", 30.0, "30.0", " 30 "])
def test_a_size_may_be_text(photos: Path, height: Any) -> None:
    assert read(photos, shape(), imageHeight=height).only.stated_size_px == (40, 30)


@pytest.mark.parametrize("height", ["x", 30.5, -30, True, [30], float("nan"), float("inf"), "9" * 5000, 10**400])
def test_a_size_that_is_none_is_reported(photos: Path, height: Any) -> None:
    found = read(photos, shape(), imageHeight=height)
    assert found.only.stated_size_px is None and found.reasons == [("note", "unreadable_size")]


def test_recognise(tmp_path: Path) -> None:
    assert recognise_labelme(tmp_path) is None
    with pytest.raises(DataError, match=r"has no \.json file"):
        read_all(read_labelme, tmp_path)
    write_json(tmp_path / "a.json", {"images": [], "annotations": [], "categories": []})
    assert recognise_labelme(tmp_path) is None
    path = write_json(tmp_path / "sub" / "b.json", {"imageData": "x" * 200_000, "imagePath": "a.jpg", "shapes": []})
    assert recognise_labelme(path) == "a .json file of labelme"
    assert recognise_labelme(tmp_path) == "2 .json files of labelme"
