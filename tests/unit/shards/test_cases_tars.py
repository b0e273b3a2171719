"""Tars that other programs wrote: names, masks, records and images as they really are in them."""

from __future__ import annotations

import io
import json
import logging
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from cogvlm_ft.data.index import ShardIndex, load_index
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.record import BadSampleError
from cogvlm_ft.data.tars import IMAGE_FORMATS
from cogvlm_ft.errors import DataError

CASE = Path(__file__).parents[2] / "cases" / "28-webdataset-names"
BOX = [1, 2, 21, 12]  # in images of 30 x 20
# 30 x 20 pixels of one colour, as runs of 62; not every Pillow writes this kind.
QOI = b"qoif\0\0\0\x1e\0\0\0\x14\x03\0\xfe\x64\x14\x14" + b"\xfd" * 9 + b"\xe8" + b"\0" * 7 + b"\x01"


def image(kind: str = "JPEG", colour: int = 100) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), (colour, 20, 20)).save(buffer, kind)
    return buffer.getvalue()


def record(phrase: str = "dog", **fields: Any) -> bytes:
    return json.dumps({"targets": [{"phrase": phrase, "boxes": [BOX]}], **fields}).encode()


def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def phrases(index: ShardIndex) -> dict[str, str]:
    """Phrase by key of every sample that can be used; the others by their error."""
    reader, found = ShardReader(index), {}
    for i in range(len(index)):
        try:
            sample = reader.read(i)
            assert sample.record.targets[0].boxes_xyxy == (tuple(map(float, BOX)),)
            found[index.key(i)] = sample.record.targets[0].phrase
        except BadSampleError as error:
            found[index.key(i)] = f"{error.reason}: {error.detail}"
    return found


def test_names_as_they_are_found(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        index = load_index(str(CASE / "in"), "train")
    assert [(loss.key, loss.reason) for loss in index.losses] == [
        ("img.0001", "dotted_key"),
        ("img.0002", "dotted_key"),
    ]
    found = phrases(index)
    assert found.pop("cap").startswith("no_targets: the record: found 'caption', 'url', 'key'")
    assert found == {"x/a": "xa", "y/a": "ya", "m": "m", "n": "n"}
    assert {index.key(i): bytes(index.exts[i]).decode() for i in range(len(index))}["m"] == "jpg"
    assert [(note.key, note.reason) for note in index.notes] == [("m", "several_images")]
    assert "img.0001" in caplog.text and "took m.jpg" in caplog.text


def test_tars_of_img2dataset_are_named_as_they_are() -> None:
    with pytest.raises(
        DataError, match=r"found 00000\.tar; expected shards named train-\*\.tar\. .*00000\.tar or .*\*"
    ):
        load_index(str(CASE / "in2"), "train")
    assert len(load_index(str(CASE / "in2" / "00000.tar"), "train")) == 1


@pytest.mark.parametrize(
    "name", ["json", "JSON", "jsn", "annotation.json", "annotations.json", "annotation.jsn", "Annotation.JSON"]
)
def test_records_may_have_several_names(tmp_path: Path, name: str) -> None:
    members = [("a.JPEG", image()), (f"a.{name}", record()), ("a.txt", b"dog"), ("a.meta.json", b"{}")]
    index = load_index(str(write(tmp_path / "x.tar", members)), "train")
    assert phrases(index) == {"a": "dog"} and not index.losses


def test_a_record_of_another_name_is_not_guessed(tmp_path: Path) -> None:
    members = [("a.jpg", image()), ("a.boxes.json", record()), ("b.jpg", image()), ("b.json", record())]
    index = load_index(str(write(tmp_path / "x.tar", members)), "train")
    [loss] = index.losses
    assert (loss.key, loss.reason) == ("a", "no_json")
    assert loss.detail == "found a.jpg and a.boxes.json; expected a.json"


@pytest.mark.parametrize("kind", IMAGE_FORMATS)
def test_every_kind_of_image(tmp_path: Path, kind: str) -> None:
    if kind in ("AVIF", "JPEG2000", "WEBP") and not features.check({"JPEG2000": "jpg_2000"}.get(kind, kind.lower())):
        pytest.skip(f"this Pillow has no {kind}")
    for extension in IMAGE_FORMATS[kind]:
        path = tmp_path / f"{extension}.tar"
        content = QOI if kind == "QOI" else image(kind)
        index = load_index(str(write(path, [(f"a.{extension.upper()}", content), ("a.json", record())])), "train")
        assert phrases(index) == {"a": "dog"}, extension


@pytest.mark.parametrize("order", [("png", "jpg"), ("jpg", "png")])
def test_the_jpeg_is_the_photo_and_the_png_its_mask(tmp_path: Path, order: tuple[str, str]) -> None:
    data = {"png": image("PNG", 0), "jpg": image("JPEG", 200)}
    members = [*((f"a.{ext}", data[ext]) for ext in order), ("a.json", record())]
    index = load_index(str(write(tmp_path / "x.tar", members)), "train")
    assert ShardReader(index).read(0).image.getpixel((5, 5))[0] > 190  # type: ignore[index]
    members += [("b.png", data["png"]), ("b.json", record())]  # its photo is missing
    index = load_index(str(write(tmp_path / "x.tar", members)), "train")
    assert [(loss.key, loss.reason) for loss in index.losses] == [("b", "no_image")]
    assert "mask" in index.losses[0].detail and len(index) == 1


@pytest.mark.parametrize("pair", [("png", "webp"), ("jpg", "jpeg"), ("tif", "jpg"), ("bmp", "png")])
def test_two_images_that_may_both_be_the_photo_are_refused(tmp_path: Path, pair: tuple[str, str]) -> None:
    members = [*((f"a.{ext}", image()) for ext in pair), ("a.json", record()), ("b.jpg", image()), ("b.json", record())]
    index = load_index(str(write(tmp_path / "x.tar", members)), "train")
    [loss] = index.losses
    assert (loss.key, loss.reason) == ("a", "several_images") and f"a.{pair[0]}" in loss.detail
    assert phrases(index) == {"b": "dog"}


def test_a_photo_and_its_record_in_two_tars(tmp_path: Path) -> None:
    write(tmp_path / "train-0.tar", [("a.jpg", image()), ("a.json", record()), ("b.jpg", image())])
    write(tmp_path / "train-1.tar", [("b.json", record()), ("c.jpg", image()), ("c.json", record())])
    index = load_index(str(tmp_path), "train")
    assert {(loss.key, loss.reason) for loss in index.losses} == {("b", "in_two_shards")}
    assert "the photo is in train-0.tar, its record in train-1.tar" in index.losses[0].detail


def test_a_key_in_two_tars_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(2):
        write(tmp_path / f"train-{number}.tar", [("a.jpg", image()), ("a.json", record())])
    with caplog.at_level(logging.WARNING):
        index = load_index(str(tmp_path), "train")
    assert [index.key(i) for i in range(len(index))] == ["train-0/a", "train-1/a"]
    assert "keys that are in two tars: 1, such as 'a' in train-0.tar and train-1.tar" in caplog.text


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"boxes": None}, r"targets\[0\]\.boxes: found None; expected a list of \[x0, y0, x1, y1\] in pixels"),
        ({"boxes": BOX}, r"targets\[0\]\.boxes\[0\]: found 1; expected a list"),
        ({"boxes": [BOX], "boxes_xyxy": [[1, 2, 21, 13]]}, r"targets\[0\]\.boxes: found .*, as in boxes_xyxy"),
        ({"boxes": [["1", 2, 21, 12]]}, r"targets\[0\]\.boxes\[0\]: found \['1', 2, 21, 12\]; expected four finite"),
        ({"boxes": [[0.1, 0.1, 0.7, 0.6]]}, r"boxes: found \[0\.1, .*expected pixels .*not fractions"),
        ({"boxes": [BOX], "format": "xywh"}, r"targets\[0\]\.format: found 'xywh'; expected boxes \[x0, y0, x1, y1\]"),
        ({"boxes": [BOX], "unit": "percent"}, r"targets\[0\]\.unit: found 'percent'"),
        ({"boxes": [BOX], "phrase": 7}, r"targets\[0\]\.phrase: found 7"),
    ],
)
def test_errors_name_the_field(tmp_path: Path, target: dict[str, Any], words: str) -> None:
    content = json.dumps({"targets": [{"phrase": "dog", **target}]}).encode()
    index = load_index(str(write(tmp_path / "x.tar", [("a.jpg", image()), ("a.json", content)])), "train")
    with pytest.raises(BadSampleError, match=words):
        ShardReader(index).read(0)


_NAMES = st.lists(st.sampled_from(["photo", "img_01", "照片", "IMG-2", "a b"]), min_size=1, max_size=4, unique=True)


@given(
    names=_NAMES,
    folders=st.lists(st.sampled_from(["", "x/", "y/", "x/y.z/"]), min_size=1, max_size=3, unique=True),
    extensions=st.sampled_from([("jpg",), ("JPG",), ("png", "jpg"), ("jpeg", "mask.png"), ("jpg", "png", "txt")]),
    stems=st.lists(st.integers(0, 99), max_size=4, unique=True),
    mixed=st.randoms(use_true_random=False),
)
@settings(max_examples=30)
def test_what_is_in_a_tar_is_read_or_reported(
    names: list[str], folders: list[str], extensions: tuple[str, ...], stems: list[int], mixed: Any
) -> None:
    keys = [f"{folder}{name}" for folder in folders for name in names]
    groups = []
    for number, key in enumerate(keys):
        colour = 50 + 10 * number
        parts = [
            (f"{key}.{ext}", image("JPEG", colour) if "jp" in ext.lower() else image("PNG", 0)) for ext in extensions
        ]
        parts.append((f"{key}.json", record(key)))
        mixed.shuffle(parts)
        groups.append(parts)
    groups += [[(f"dotted.{stem}.jpg", image()), (f"dotted.{stem}.json", record())] for stem in stems]
    mixed.shuffle(groups)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "x.tar", [part for group in groups for part in group])
        index = load_index(str(path), "train")
        assert phrases(index) == {key: key for key in keys}
        reader = ShardReader(index)
        for i in range(len(index)):
            red = reader.read(i).image.getpixel((5, 5))[0]  # type: ignore[index]
            assert abs(red - (50 + 10 * keys.index(index.key(i)))) < 6
    assert sorted(loss.key for loss in index.losses) == sorted(f"dotted.{stem}" for stem in stems)
    assert len(index.notes) == (len(keys) if "png" in extensions else 0)
