"""A candidate against its image: units, images inside annotations, files that must not be read."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from photo_builds import image_bytes

from cogvlm_ft.grounding.targets import Box, Target
from cogvlm_ft.shards.packing import files
from cogvlm_ft.shards.packing.candidates import Candidate, Rejected, box_in_pixels, check_text, require
from cogvlm_ft.shards.packing.checks import CheckedSample, check_candidate, read_image
from cogvlm_ft.shards.packing.files import read_embedded, read_inside

MAX_PIXELS = 10**6


def candidate(*boxes: Box, image: str = "a.jpg", **fields: Any) -> Candidate:
    return Candidate(image, None, "x", (Target("dog", "en", boxes),), **fields)


def checked(found: Candidate, images: Path, **settings: Any) -> tuple[CheckedSample | None, list[str]]:
    sample, problems = check_candidate(found, "k", images, MAX_PIXELS, **settings)
    return sample, [problem.reason for problem in problems]


def embedded(folder: Path, data: Any) -> Path:
    text = base64.b64encode(data).decode() if isinstance(data, bytes) else data
    path = folder / "a.json"
    path.write_text(json.dumps({"imageData": text}))
    return path


@pytest.mark.parametrize(
    ("units", "box"),
    [("pixels", (10, 3, 30, 15)), ("unit", (0.25, 0.1, 0.75, 0.5)), ("thousandths", (250, 100, 750, 500))],
)
def test_boxes_become_pixels_when_the_image_is_open(photos: Path, units: Any, box: Box) -> None:
    sample, reasons = checked(candidate(box, units=units), photos)
    assert sample and not reasons
    assert sample.record.targets[0].boxes_xyxy == ((10, 3, 30, 15),)
    assert sample.record.image_size_px == (40, 30)


@pytest.mark.parametrize("units", ["unit", "thousandths"])
def test_boxes_in_other_units_are_checked_in_pixels(photos: Path, units: Any) -> None:
    whole = {"unit": 1.0, "thousandths": 1000.0}[units]
    nearly = 1.02 * whole  # 40.8 pixels: a rounding error; 30.6 too
    sample, reasons = checked(candidate((0, 0, nearly, nearly), (0, 0, 1.1 * whole, 0.5 * whole), units=units), photos)
    assert sample and sample.record.targets[0].boxes_xyxy == ((0, 0, 40, 30),)
    assert reasons == ["box_outside_image"]
    assert checked(candidate((0, 0, 1e308, 1e308), units=units), photos)[1][0] == "box_outside_image"


def test_units_are_exact_where_floats_can_be() -> None:
    assert box_in_pixels((0, 0, 1, 1), "unit", (1333, 777)) == (0, 0, 1333, 777)
    assert box_in_pixels((0, 1, 999, 1000), "thousandths", (2000, 3)) == (0, 0.003, 1998, 3)


@pytest.mark.parametrize(
    ("image_format", "ext"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("BMP", "bmp"), ("TIFF", "tif")]
)
@pytest.mark.parametrize("image", ["gone.jpg", "a.json", "gone/gone"])
def test_an_image_inside_the_annotation_is_used_when_there_is_no_file(
    tmp_path: Path, image_format: str, ext: str, image: str
) -> None:
    data = image_bytes(image_format=image_format)
    found = candidate((1, 1, 9, 9), image=image, embedded_in=embedded(tmp_path, data))
    sample, reasons = checked(found, tmp_path)
    assert sample and not reasons
    assert (sample.ext, sample.image, sample.record.image_size_px) == (ext, data, (40, 30))


def test_the_file_comes_before_the_image_inside_the_annotation(photos: Path) -> None:
    found = candidate((1, 1, 9, 9), embedded_in=embedded(photos, image_bytes(9, 9)))
    assert read_image(found, photos) == ("jpg", (photos / "a.jpg").read_bytes())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (image_bytes()[:-300], "broken_image"),
        (b"<html>", "broken_image"),
        (b"", "broken_image"),
        ("~~~ not base64 ~~~é", "missing_image"),
        (None, "missing_image"),
        (7, "missing_image"),
        (image_bytes(60, 60), "too_many_pixels"),
        (image_bytes(41, 30), "size_mismatch"),
    ],
)
def test_an_image_inside_the_annotation_is_checked_like_a_file(tmp_path: Path, data: Any, reason: str) -> None:
    found = candidate((1, 1, 9, 9), image="x.jpg", embedded_in=embedded(tmp_path, data), stated_size_px=(40, 30))
    sample, problems = check_candidate(found, "k", tmp_path, 3000)
    assert sample is None and [problem.reason for problem in problems] == [reason]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"[" * 100_000, b"\xff\xfe"])
def test_an_annotation_that_changed_since_it_was_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(Rejected) as error:
        read_embedded(tmp_path / "a.json")
    assert error.value.reason == "missing_image"


def test_a_path_out_of_the_folder_is_no_reason_to_look_into_the_annotation(tmp_path: Path) -> None:
    found = candidate((1, 1, 9, 9), image="../a.jpg", embedded_in=embedded(tmp_path, image_bytes()))
    assert checked(found, tmp_path) == (None, ["path_outside_images"])


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    assert checked(candidate((1, 1, 9, 9)), tmp_path) == (None, ["missing_image"])


def test_files_have_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"12345")
    assert read_inside(tmp_path, "a.txt", "annotation", 5) == b"12345"
    with pytest.raises(Rejected, match="has 5 bytes; expected at most 4") as error:
        read_inside(tmp_path, "a.txt", "annotation", 4)
    assert error.value.reason == "too_large"
    found = candidate((1, 1, 9, 9), image="gone.jpg", embedded_in=embedded(tmp_path, image_bytes()))
    monkeypatch.setattr(files, "MAX_ANNOTATION_BYTES", 100)
    assert checked(found, tmp_path) == (None, ["too_large"])


def test_verify_is_passed_on(photos: Path) -> None:
    data = bytearray((photos / "a.jpg").read_bytes())
    data[data.find(b"\xff\xc0") + 12] = 3  # a quantization table that is not there
    (photos / "a.jpg").write_bytes(data)
    assert checked(candidate((1, 1, 9, 9)), photos)[0]
    sample, reasons = checked(candidate((1, 1, 9, 9)), photos, verify="decode")
    assert sample is None and reasons == ["broken_image"]


def test_messages_are_short_whatever_is_found() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, {"a": deep}, ["x" * 10**6] * 10**5, "y" * 10**6):
        with pytest.raises(Rejected) as error:
            require(False, "box", "the box", value, "four numbers")
        assert len(error.value.detail) < 150
    check_text(deep, "sample")
    with pytest.raises(Rejected):
        check_text({"a": [{"\udcff": 1}]}, "sample")
