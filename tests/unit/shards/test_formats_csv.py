"""CSV: columns, lines of one image, and lines that cannot be read."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest
from format_files import Reading, read_all

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.formats import csv_boxes
from cogvlm_ft.shards.formats.csv_boxes import read_csv_boxes, recognise_csv_boxes
from cogvlm_ft.shards.packing.candidates import Candidate

HEADER = "image,left,top,right,bottom,question"
GOOD = "a.jpg,1,2,30,20,dog"


def write(tmp_path: Path, *lines: str | bytes) -> Path:
    path = tmp_path / "x.csv"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def read(tmp_path: Path, *lines: str | bytes) -> Reading:
    return read_all(read_csv_boxes, write(tmp_path, *lines))


def test_lines_of_one_image_are_one_candidate_wherever_they_stand(tmp_path: Path) -> None:
    lines = [
        "a.jpg,1,1,2,2,dog",
        "b.jpg,2,2,3,3,dog",
        "./a.jpg,3,3,4,4,cat",
        "",
        "b.jpg,4,4,5,5,cow",
        "a.jpg,5,5,6,6,dog",
    ]
    found = read(tmp_path, HEADER, *lines)
    assert not found.problems
    assert found.boxes == {
        "a.jpg": {"dog": ((1, 1, 2, 2), (5, 5, 6, 6)), "cat": ((3, 3, 4, 4),)},
        "b.jpg": {"dog": ((2, 2, 3, 3),), "cow": ((4, 4, 5, 5),)},
    }
    assert [candidate.source for candidate in found.candidates] == ["x.csv:2", "x.csv:3"]


def test_two_images_whose_hashes_are_equal_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class SameHash:
        def __init__(self, data: bytes, digest_size: int) -> None:
            pass

        def digest(self) -> bytes:
            return bytes(8)

    monkeypatch.setattr(csv_boxes, "blake2b", SameHash)
    found = read(tmp_path, HEADER, GOOD, GOOD.replace("a.", "b."), GOOD.replace("dog", "cat"))
    assert {image: list(boxes) for image, boxes in found.boxes.items()} == {"a.jpg": ["dog", "cat"], "b.jpg": ["dog"]}


@pytest.mark.parametrize(
    "header",
    [
        "filename,xmin,ymin,xmax,ymax,class",
        "File_Name, X0 ,Y0,X1,Y1,Caption",
        "image_path,x1,y1,x2,y2,phrase",
        "url,x_min,y_min,x_max,y_max,label",
        "\ufeffimage,left,top,right,bottom,question",
        '"image","left","top","right","bottom","question"',
    ],
)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_names_of_columns_and_what_separates_them(tmp_path: Path, header: str, delimiter: str) -> None:
    lines = [line.replace(",", delimiter) for line in (header, GOOD)]
    assert read(tmp_path, *lines).boxes == {"a.jpg": {"dog": ((1, 2, 30, 20),)}}
    assert (
        recognise_csv_boxes(tmp_path / "x.csv")
        == "a CSV file with columns for image, left, top, right, bottom, question"
    )


def test_optional_columns_in_any_order(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        "id,question,language,height,width,bottom,right,top,left,image",
        "7,OK,zh,30,40,20,30,2,1,a.jpg",
        "8,狗,,30.0,40,20,30,2,1,a.jpg",
        "9,狗,,,,21,30,2,1,b.jpg",
        "9,ok,EN,0,0,21,30,2,1,c.jpg",
    )
    assert not found.problems
    assert [candidate.stated_size_px for candidate in found.candidates] == [(40, 30), None, None]
    languages = [[target.language for target in candidate.targets] for candidate in found.candidates]
    assert languages == [["zh", "zh"], ["zh"], ["en"]]


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("https://example.org/set/000000001066.jpg", "000000001066.jpg"),
        ("https://example.org/set/a%20b.jpg?size=large#top", "a b.jpg"),
        ("s3://bucket/x/a.png", "a.png"),
        ("sub/a.jpg", "sub/a.jpg"),
        ("sub\\a.jpg", "sub/a.jpg"),
        ("https://example.org/..%2F..%2Fa.jpg", "a.jpg"),
    ],
)
def test_of_a_url_the_last_part_counts(tmp_path: Path, image: str, name: str) -> None:
    assert read(tmp_path, HEADER, f"{image},1,2,30,20,dog").only.image == name


def test_phrases_in_quotes_and_with_blanks(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        HEADER,
        'a.jpg,1,2,30,20,"Which one is red, and ""round""?"',
        'a.jpg,1,2,30,20," What  do\r\nwe eat? "\r',
        "a.jpg,1,2,30,20,What do we eat?\r",
        'b.jpg,1,2,30,20,5" pipe',
    )
    assert not found.problems
    assert list(found.boxes["a.jpg"]) == ['Which one is red, and "round"?', "What do we eat?"]
    assert len(found.boxes["a.jpg"]["What do we eat?"]) == 2
    assert list(found.boxes["b.jpg"]) == ['5" pipe'] and found.candidates[1].source == "x.csv:6"


@pytest.mark.parametrize(
    ("line", "level", "reason"),
    [
        ("a.jpg,1,2,30,dog", "target", "wrong_number_of_columns"),
        ("a.jpg,1,2,30,20,dog, the red one", "target", "wrong_number_of_columns"),
        ('a.jpg,1,2,30,20,"dog"s', "target", "bad_line"),
        ('a.jpg,1,2,30,20,"dog', "target", "bad_line"),
        (b"a.jpg,1,2,30,20,\xff\xb7", "target", "not_utf8"),
        (b"\xff.jpg,1,2,30,20,dog", "target", "not_utf8"),
        (",1,2,30,20,dog", "sample", "bad_field"),
        ("https://example.org/,1,2,30,20,dog", "sample", "bad_field"),
        ("http://[,1,2,30,20,dog", "target", "bad_field"),
        ("a.jpg,x,2,30,20,dog", "box", "not_numeric"),
        ("a.jpg,,2,30,20,dog", "box", "not_numeric"),
        ("a.jpg,1,nan,30,20,dog", "box", "not_finite"),
        ("a.jpg,1,2,1e999,20,dog", "box", "not_finite"),
        ("a.jpg,1,2,30,20,", "target", "empty_phrase"),
        ("a.jpg,1,2,30,20," + "x" * 200_000, "target", "bad_line"),
    ],
)
def test_a_bad_line_is_lost_alone(tmp_path: Path, line: str | bytes, level: str, reason: str) -> None:
    last = "b.jpg,1,2,30,20,cat"
    found = read(tmp_path, HEADER, GOOD, line, GOOD, last)
    boxes = {"dog": ((1, 2, 30, 20), (1, 2, 30, 20))}
    assert found.boxes == {"a.jpg": boxes, "b.jpg": {"cat": ((1, 2, 30, 20),)}}
    assert found.reasons == [(level, reason)] and found.problems[0].source == "x.csv:3"


def test_a_quote_that_is_never_closed_costs_one_line(tmp_path: Path) -> None:
    lines = [GOOD] * 50
    lines[10] = 'a.jpg,1,2,30,20,"dog'
    lines[30] = 'a.jpg,1,2,30,20,"a ""fine"" one"'
    found = read(tmp_path, HEADER, *lines)
    assert len(found.boxes["a.jpg"]["dog"]) == 48 and len(found.boxes["a.jpg"]['a "fine" one']) == 1
    assert [problem.source for problem in found.problems] == ["x.csv:12"]


def test_sizes_and_languages_that_contradict_or_are_wrong(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        f"{HEADER},width,height,language",
        f"{GOOD},40,30,",
        "a.jpg,1,2,3,4,cat,41,30,",
        "a.jpg,1,2,3,4,cow,40,30,fr",
        "a.jpg,1,2,3,4,ant,,,en",
    )
    assert list(found.boxes["a.jpg"]) == ["dog", "ant"] and found.only.stated_size_px == (40, 30)
    assert found.reasons == [("target", "contradiction"), ("target", "bad_field")]


def test_a_phrase_that_loses_all_its_boxes_is_lost(tmp_path: Path) -> None:
    found = read(tmp_path, HEADER, GOOD, "a.jpg,x,2,3,4,cat")
    assert list(found.boxes["a.jpg"]) == ["dog"]
    assert found.reasons == [("box", "not_numeric"), ("target", "no_boxes_left")]


@pytest.mark.parametrize(
    "first",
    ["", "a,1,2,30,20,dog", "image,left,top,right,bottom", "image\tleft,top", "\0", '"image', "x" * 200_000],
)
def test_without_names_of_columns_nothing_can_be_read(tmp_path: Path, first: str) -> None:
    with pytest.raises(DataError, match=r"the first line has the columns .*; expected columns for the image, its box"):
        read(tmp_path, first, GOOD)
    assert recognise_csv_boxes(tmp_path / "x.csv") is None


def test_a_folder_is_no_csv(tmp_path: Path) -> None:
    assert recognise_csv_boxes(tmp_path) is None
    with pytest.raises(DataError, match=r"no _annotations\.csv in it"):
        read_all(read_csv_boxes, tmp_path)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_lines(tmp_path: Path) -> None:
    images = [f"{i % 2000:08d}.jpg" for i in range(4000)]
    random.Random(0).shuffle(images)
    path = write(tmp_path, HEADER, *(f"{name},1,2,30,20,What is this? {'x' * 500}" for name in images))
    assert path.stat().st_size > 2_000_000
    tracemalloc.start()
    num_boxes = 0
    for part in read_csv_boxes(path, tmp_path):
        assert isinstance(part, Candidate)
        num_boxes += len(part.targets[0].boxes_xyxy)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_boxes == 4000
    assert peak < 800_000
