"""A folder with several label sets: conversions of one are read without a question, others are the user's choice."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from format_files import write_json, write_lines
from PIL import Image

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.build import main as build
from cogvlm_ft.shards.formats.choice import choose_source
from cogvlm_ft.shards.review import main as review
from cogvlm_ft.terminal import counted

DATA = Path(__file__).parents[3].parent / "shared" / "data"
SIZE = (200, 100)
BOXES = {"a": (20, 10, 60, 50), "b": (100, 40, 150, 90), "c": (0, 0, 200, 100)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in BOXES:
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", SIZE).save(tmp_path / "images" / f"{name}.jpg")
    return tmp_path


def write_yolo(folder: Path, names: str = "abc", classes: str = "dog\n") -> None:
    (folder / "labels").mkdir()
    if classes:
        (folder / "classes.txt").write_text(classes)
    for name in names:
        x0, y0, x1, y1 = BOXES[name]
        numbers = (x0 + x1) / 2 / SIZE[0], (y0 + y1) / 2 / SIZE[1], (x1 - x0) / SIZE[0], (y1 - y0) / SIZE[1]
        (folder / "labels" / f"{name}.txt").write_text(f"0 {' '.join(map(str, numbers))}\n")


def write_coco(folder: Path, names: str = "abc", *, shift_px: int = 0, label: str = "dog") -> None:
    content: dict[str, Any] = {"categories": [{"id": 1, "name": label}], "images": [], "annotations": []}
    for i, name in enumerate(names):
        x0, y0, x1, y1 = BOXES[name]
        content["images"].append({"id": i, "file_name": f"{name}.jpg", "width": SIZE[0], "height": SIZE[1]})
        bbox = [x0 + shift_px, y0, x1 - x0 - shift_px, y1 - y0]
        content["annotations"].append({"id": i, "image_id": i, "category_id": 1, "bbox": bbox})
    write_json(folder / "instances.json", content)


def test_of_two_conversions_the_fuller_is_read(folder: Path) -> None:
    write_yolo(folder, "ab")
    write_coco(folder, shift_px=1)  # tools round, and some count from 1
    name, path, seen = choose_source(folder, folder)
    assert (name, path) == ("coco", folder)
    assert (
        seen == "COCO files: instances.json, 3 boxes in 3 photos; --format yolo has 2 boxes in 2 photos, the same ones"
    )


def test_review_and_build_read_such_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_yolo(folder)
    write_coco(folder)
    assert review(["--annotations", str(folder), "--out", str(folder / "review"), "--workers", "1"]) == 0
    assert build(["--annotations", str(folder), "--out", str(folder / "shards"), "--workers", "1"]) == 0
    line = "reading --format yolo: 4 .txt files with YOLO lines, 3 boxes in 3 photos; --format coco has the same boxes"
    assert capsys.readouterr().out.count(line) == 2


@pytest.mark.parametrize(
    ("yolo", "coco", "why"),
    [
        ({}, {"shift_px": 10}, "the boxes of a.jpg differ"),
        ({}, {"label": "cat"}, "the boxes of a.jpg differ"),
        ({"names": "ab"}, {"names": "bc"}, "is labelled as (yolo|coco) only"),
    ],
)
def test_label_sets_that_differ_are_the_users_choice(
    folder: Path, yolo: dict[str, Any], coco: dict[str, Any], why: str
) -> None:
    write_yolo(folder, **yolo)
    write_coco(folder, **coco)
    with pytest.raises(DataError, match=rf"several formats: .*--format yolo.*--format coco.*; .*{why}. Choose one"):
        choose_source(folder, folder)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_at_a_terminal_the_user_is_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_yolo(folder)
    write_coco(folder, shift_px=10)
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stdin", Terminal("what\n2\n"))
    assert choose_source(folder, folder).format == "coco"
    assert "1  yolo: 4 .txt files" in out.getvalue() and "2  coco: COCO files" in out.getvalue()
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    with pytest.raises(DataError, match="several formats"):
        choose_source(folder, folder)


def test_labels_that_cannot_be_read_are_named_and_left_out(folder: Path) -> None:
    write_yolo(folder, classes="")
    write_coco(folder)
    name, _, seen = choose_source(folder, folder)
    assert name == "coco" and "--format yolo fits too, but cannot be read: no file of class names" in seen


def test_the_only_file_with_labels_of_a_folder_is_read(folder: Path) -> None:
    lines = [{"image": f"{name}.jpg", "targets": [{"phrase": "dog", "boxes": [box]}]} for name, box in BOXES.items()]
    path = write_lines(folder / "mine.jsonl", lines)
    (folder / "notes.json").write_text("{}")
    assert choose_source(folder, folder)[:2] == ("jsonl", path)
    write_lines(folder / "more.jsonl", lines)
    with pytest.raises(DataError, match=r"found 2 files with labels: .*; expected one. Name it: --annotations .*mine"):
        choose_source(folder, folder)


def test_photos_without_labels_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"photos without labels. Name the file or folder of the labels: --annotations"):
        choose_source(folder, folder)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data sets are not in {DATA}")
@pytest.mark.parametrize(("path", "name"), [("coco128_train", "yolo"), ("xlabel_phrases", "labelme")])
def test_real_sets_with_conversions_beside_them(path: str, name: str) -> None:
    assert choose_source(DATA / path, DATA / path).format == name


@pytest.mark.parametrize(("number", "shown"), [(0, "0 boxes"), (1, "1 box"), (2, "2 boxes")])
def test_numbers_agree_with_their_nouns(number: int, shown: str) -> None:
    assert counted(number, "box") == shown
