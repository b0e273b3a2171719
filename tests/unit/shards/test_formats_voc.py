"""Pascal VOC: names, sizes, boxes, and XML that must not be trusted."""

from __future__ import annotations

from pathlib import Path

import pytest
from format_files import Reading, read_all

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.formats import voc
from cogvlm_ft.shards.formats.voc import read_voc, recognise_voc

SIZE = "<size><width>40</width><height>30</height><depth>3</depth></size>"


def thing(name: str = "dog", *corners: object) -> str:
    names = ("xmin", "ymin", "xmax", "ymax")
    box = "".join(f"<{name}>{corner}</{name}>" for name, corner in zip(names, corners or (1, 2, 30, 20), strict=True))
    return f"<object><name>{name}</name><pose/><bndbox>{box}</bndbox></object>"


def annotation(*parts: str, filename: str = "a.jpg") -> str:
    return f"<annotation><filename>{filename}</filename>{''.join(parts)}</annotation>"


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)
    return path


def read(photos: Path, text: str) -> Reading:
    return read_all(read_voc, write(photos.parent / "xml" / "a.xml", text), photos)


def test_one_target_per_class_in_the_order_of_the_file(photos: Path) -> None:
    things = [thing("dog"), thing("红色的车", 0.5, 1.25, "9", " 8 "), thing("dog", 3, 3, 4, 4), thing("ant")]
    found = read(photos, annotation(SIZE, *things))
    assert not found.problems
    assert [(target.phrase, target.language, target.boxes_xyxy) for target in found.only.targets] == [
        ("dog", "en", ((1, 2, 30, 20), (3, 3, 4, 4))),
        ("红色的车", "zh", ((0.5, 1.25, 9, 8),)),
        ("ant", "en", ((1, 2, 30, 20),)),
    ]
    assert found.only.stated_size_px == (40, 30) and found.only.units == "pixels"


def test_files_of_a_folder_come_in_order_with_their_subfolders(tmp_path: Path) -> None:
    for name in ("b.xml", "a.XML", "z/c.xml", "._b.xml", ".git/d.xml", "notes.txt"):
        write(tmp_path / name, annotation(thing(), filename=Path(name).stem + ".jpg"))
    found = read_all(read_voc, tmp_path, tmp_path)
    assert [candidate.image for candidate in found.candidates] == ["a.jpg", "b.jpg", "z/c.jpg"]
    assert [candidate.source for candidate in found.candidates] == ["a.XML", "b.xml", "z/c.xml"]


@pytest.mark.parametrize(
    "filename", ["a.jpg", "A.JPG", "a.png", "/home/me/photos/a.jpg", "C:\\photos\\a.jpg", "a", "", "../a.jpg"]
)
def test_the_image_is_found_by_its_name_or_by_that_of_the_xml(photos: Path, filename: str) -> None:
    text = annotation("<path>/Users/you/b.jpg</path>", thing(), filename=filename)
    found = read(photos, text)
    assert found.only.image == "a.jpg" and not found.problems


def test_the_name_of_the_xml_comes_first(photos: Path) -> None:
    found = read(photos, annotation(thing(), filename="b.jpg"))
    assert found.only.image == "a.jpg" and found.reasons == [("note", "stale_image_name")]
    (photos / "a.jpg").unlink()
    found = read(photos, annotation(thing(), filename="b.jpg"))
    assert found.only.image == "b.jpg" and not found.problems


def test_an_image_that_is_nowhere_is_named(photos: Path) -> None:
    (photos / "a.jpg").unlink()
    assert read(photos, annotation(thing(), filename="x/gone.png")).only.image == "gone.png"
    assert read(photos, annotation(thing(), filename="")).only.image == "a.jpg"


@pytest.mark.parametrize(
    ("xml", "image"),
    [
        ("Annotations/a.xml", "JPEGImages/a.jpg"),
        ("annotations/train/a.xml", "images/train/a.jpg"),
        ("annotations/a.xml", "a.jpg"),
        ("s1/Annotations/a.xml", "s1/JPEGImages/a.jpg"),
        ("sub/a.xml", "sub/a.jpg"),
    ],
)
def test_where_data_sets_keep_their_images(tmp_path: Path, xml: str, image: str) -> None:
    write(tmp_path / xml, annotation(thing()))
    write(tmp_path / image, "")
    assert read_all(read_voc, tmp_path, tmp_path).only.image == image


@pytest.mark.parametrize(
    ("size", "stated"),
    [
        ("", None),
        ("<size><width>0</width><height>0</height></size>", None),
        ("<size><width>40</width></size>", None),
        ("<size><width/><height/></size>", None),
        ("<size><width>-4</width><height>30</height></size>", None),
        ("<size><width> 40 </width><height>30</height></size>", (40, 30)),
    ],
)
def test_a_size_may_be_unknown(photos: Path, size: str, stated: tuple[int, int] | None) -> None:
    assert read(photos, annotation(size, thing())).only.stated_size_px == stated


def test_parts_of_an_object_are_not_the_object(photos: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>7</xmin><ymin>7</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>"
    found = read(photos, annotation(thing().replace("<pose/>", part)))
    assert found.boxes == {"a.jpg": {"dog": ((1, 2, 30, 20),)}} and not found.problems


@pytest.mark.parametrize(
    ("bad", "reasons"),
    [
        (thing("dog", "x", 2, 3, 4), [("box", "not_numeric")]),
        (thing("dog", "nan", 2, 3, 4), [("box", "not_finite")]),
        (thing("dog", 1, "1e999", 3, 4), [("box", "not_finite")]),
        ("<object><name>dog</name></object>", [("box", "not_numeric")]),
        ("<object><name>cat</name><bndbox/></object>", [("box", "not_numeric"), ("target", "no_boxes_left")]),
        (thing(""), [("target", "empty_phrase")]),
        ("<object/>", [("target", "empty_phrase")]),
    ],
)
def test_a_bad_object_is_lost_alone(photos: Path, bad: str, reasons: list[tuple[str, str]]) -> None:
    found = read(photos, annotation(bad, thing()))
    assert found.boxes == {"a.jpg": {"dog": ((1, 2, 30, 20),)}}
    assert found.reasons == reasons and "a.xml" in found.problems[0].source


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no xml",
        "<annotation><object>",
        annotation("<object></size>"),
        "<html></html>",
        '<!DOCTYPE annotation SYSTEM "file:///etc/passwd">' + annotation(thing()),
        '<!DOCTYPE a [<!ENTITY a "dog"><!ENTITY b "&a;&a;">]>' + annotation(thing("&b;")),
        annotation(thing("&undefined;")),
        "<annotation>" + "<a>" * 100_000,
    ],
)
def test_a_bad_file_is_lost_alone(photos: Path, text: str) -> None:
    folder = photos.parent / "xml"
    write(folder / "b.xml", annotation(thing(), filename="b.jpg"))
    write(folder / "a.xml", text)
    found = read_all(read_voc, folder, photos)
    assert found.reasons == [("sample", "bad_xml")] and found.problems[0].source == "a.xml"
    assert found.only.image == "b.jpg"


def test_a_document_type_in_another_encoding_is_refused_too(photos: Path) -> None:
    text = '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY e "x">]>' + annotation(thing("&e;"))
    path = write(photos.parent / "a.xml", text, "utf-16")
    found = read_all(read_voc, path, photos)
    assert found.reasons == [("sample", "bad_xml")] and "DOCTYPE" in found.problems[0].detail


def test_other_encodings_are_read(photos: Path) -> None:
    text = '<?xml version="1.0" encoding="utf-16"?>' + annotation(thing("狗"))
    assert read_all(read_voc, write(photos.parent / "a.xml", text, "utf-16"), photos).boxes["a.jpg"].keys() == {"狗"}
    path = write(photos.parent / "a.xml", '<?xml version="1.0" encoding="GBK"?>' + annotation(thing("狗")), "gbk")
    assert read_all(read_voc, path, photos).boxes["a.jpg"].keys() == {"狗"}
    text = '<?xml version="1.0" encoding="iso-8859-1"?>' + annotation(thing("café"))
    assert read_all(read_voc, write(photos.parent / "a.xml", text, "latin-1"), photos).boxes["a.jpg"].keys() == {"café"}


def test_files_that_must_not_be_read(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = photos.parent / "xml"
    write(photos.parent / "secret.xml", annotation(thing("secret")))
    folder.mkdir()
    (folder / "a.xml").symlink_to(photos.parent / "secret.xml")
    (folder / "b.xml").symlink_to(folder / "b.xml")
    write(folder / "c.xml", annotation(*[thing()] * 100))
    monkeypatch.setattr(voc, "_MAX_BYTES", 1000)
    found = read_all(read_voc, folder, photos)
    assert found.reasons == [
        ("sample", "path_outside_annotations"),
        ("sample", "unreadable_annotation"),
        ("sample", "too_large"),
    ]
    assert not found.candidates


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    write(tmp_path / "a\udcff.xml", annotation(thing()))
    assert read_all(read_voc, tmp_path, tmp_path).reasons == [("sample", "not_utf8")]


def test_two_images_that_could_be_meant(photos: Path) -> None:
    (photos / "a.PNG").write_bytes(b"")
    (photos / "a.b.png").write_bytes(b"")  # another name
    found = read(photos, annotation(thing(), filename="gone.jpg"))
    assert found.reasons == [("sample", "ambiguous_image")] and "a.PNG and a.jpg" in found.problems[0].detail
    assert read(photos, annotation(thing())).only.image == "a.jpg"


def test_recognise(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no \.xml file"):
        next(read_voc(tmp_path, tmp_path))
    assert recognise_voc(tmp_path) is None
    path = write(tmp_path / "sub" / "a.xml", annotation())
    assert recognise_voc(path) == "a Pascal VOC .xml file"
    write(tmp_path / "z.xml", "<html>")
    assert recognise_voc(tmp_path) == "2 Pascal VOC .xml files"
    path.write_text("<annotations><version>1.1</version></annotations>")  # CVAT
    assert recognise_voc(tmp_path) is None
    write(tmp_path / "z.xml", '\ufeff<?xml version="1.0"?>\n<annotation verified="yes"></annotation>')
    assert recognise_voc(tmp_path) == "2 Pascal VOC .xml files"
    assert recognise_voc(tmp_path / "gone.xml") is None
