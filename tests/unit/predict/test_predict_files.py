"""Folders and JSONL: every question has a line, whatever is wrong with it, and nothing is written elsewhere."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import pytest
from PIL import Image

from cogvlm_ft.data import reader
from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.grounding.boxes import parse_boxes
from cogvlm_ft.launch.predict import main as predict
from cogvlm_ft.predict import large_photos
from cogvlm_ft.predict.files import MAX_PROMPT_CHARACTERS, read_questions
from cogvlm_ft.predict.serve import question_on_page

FEW = ("--max-new-tokens", 40, "--decoding", "grammar", "--min-boxes", 1)


def run(*arguments: object) -> int:
    return predict([str(argument) for argument in arguments])


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for n, name in enumerate(["b.jpg", "a.png", "sub/狗 1.JPG"]):
        Image.new("RGB", (60 + n, 40), (40 * n, 90, 90)).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"no photo")
    (folder / "notes.txt").write_text("no photo either")
    return folder


def test_a_folder(tiny_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    asked = ("--prompt", "dog", "--prompt", "狗在哪里?")
    assert run("--model", tiny_folder, "--image", photos, *asked, "--out", out, *FEW) == 0
    lines = lines_of(out)
    assert [line["image"] for line in lines] == [
        n for n in ("a.png", "b.jpg", "broken.jpg", "sub/狗 1.JPG") for _ in "12"
    ]
    good = [line for line in lines if "answers" in line]
    assert len(good) == 6 and len(lines) == 8
    for line, size in zip(good, [61, 61, 60, 60, 62, 62], strict=True):
        [answer] = line["answers"]
        assert line["image_size_px"] == [size, 40] and len(answer["boxes"]) == len(parse_boxes(answer["answer"]) or ())
        assert all(0 < box["confidence"] <= 1 and 0 <= max(box["xyxy"]) <= size for box in answer["boxes"])
    assert [answer["prompt"] for line in good for answer in line["answers"]] == ["dog", "狗在哪里?"] * 3
    assert {line["reason"] for line in lines if "error" in line} == {"broken_image"}
    drawn = sorted(path.name for path in (out / "pictures").iterdir())
    assert drawn == sorted({Path(line["picture"]).name for line in good}) and len(drawn) == 3
    printed = capsys.readouterr()
    assert "6 answered, 2 failed {'broken_image': 2}" in printed.out and "8/8" in printed.err
    assert run("--model", tiny_folder, "--image", photos, "--prompt", "dog", "--out", out) == 2
    assert "holds predictions already" in capsys.readouterr().err


def test_batches_change_nothing(tiny_folder: Path, photos: Path, tmp_path: Path) -> None:
    found = []
    for size in (1, 3):
        out = tmp_path / f"out{size}"
        asked = ("--image", photos, "--targets", "狗", "a cat", "--batch-size", size, "--no-pictures")
        assert run("--model", tiny_folder, *asked, "--out", out, *FEW, "--zoom") == 0
        assert [path.name for path in out.iterdir()] == ["predictions.jsonl"]
        found.append([[answer["answer"] for answer in line.get("answers", ())] for line in lines_of(out)])
    assert found[0] == found[1] and [len(answers) for answers in found[0]] == [2, 2, 0, 2]


def test_jsonl_has_a_line_for_every_line(tiny_folder: Path, photos: Path, tmp_path: Path) -> None:
    given = [
        '{"image": "a.png", "prompt": "dog"}',
        '{"image": "a.png", "targets": ["狗", "cat"]}',
        "{broken",
        '["a.png"]',
        '{"image": "a.png"}',
        '{"image": "a.png", "prompt": "  "}',
        '{"image": "a.png", "prompt": "\\ud800"}',
        json.dumps({"image": "a.png", "prompt": "x" * (MAX_PROMPT_CHARACTERS + 1)}),
        '{"image": "gone.png", "prompt": "dog"}',
        '{"image": "/dev/zero", "prompt": "dog"}',
        '{"image": "a\\u0000b", "prompt": "dog"}',
        '{"image": "../photos/sub/../b.jpg", "prompt": "dog"}',
    ]
    (photos / "ask.jsonl").write_text("\n\n".join(given))
    out = tmp_path / "out"
    before = set(tmp_path.rglob("*"))
    assert run("--model", tiny_folder, "--image", photos / "ask.jsonl", "--out", out, *FEW) == 0
    lines = lines_of(out)
    assert len(lines) == len(given)
    assert [len(line.get("answers", ())) for line in lines] == [1, 2, *[0] * 9, 1]
    reasons = [line.get("reason") for line in lines]
    assert reasons[2:11] == ["bad_question"] * 6 + ["no_such_file"] * 3
    assert "line 5" in lines[2]["error"]
    assert all(out in path.parents or path == out for path in set(tmp_path.rglob("*")) - before)


def test_nothing_answered_is_a_failure(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ask.jsonl").write_text('{"image": "gone.png", "prompt": "dog"}')
    assert run("--model", tiny_folder, "--image", tmp_path / "ask.jsonl", "--out", tmp_path / "out") == 2
    assert len(lines_of(tmp_path / "out")) == 1


def test_a_photo_of_too_many_pixels_is_a_line(
    tiny_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert large_photos.MAX_PIXELS == reader.MAX_PIXELS
    monkeypatch.setattr(large_photos, "MAX_PIXELS", 60 * 40)
    assert run("--model", tiny_folder, "--image", photos, "--prompt", "dog", "--out", tmp_path / "out", *FEW) == 0
    assert [line.get("reason") for line in lines_of(tmp_path / "out")] == [
        "too_many_pixels",
        None,
        "broken_image",
        "too_many_pixels",
    ]


def test_what_cannot_be_asked(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="found no line"):
        read_questions(tmp_path / "empty.jsonl", [])
    with pytest.raises(ConfigError, match="Omit --prompt"):
        read_questions(tmp_path / "empty.jsonl", ["dog"])
    with pytest.raises(ConfigError, match="nothing is asked"):
        read_questions(photos, [])
    with pytest.raises(DataError, match="no such file"):
        read_questions(tmp_path / "gone", ["dog"])
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no photo below it"):
        read_questions(tmp_path / "none", ["dog"])


def test_one_photo(tiny_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "answer.png"
    asked = ("--image", photos / "a.png", "--prompt", "dog", "--targets", "狗", "--out", picture)
    assert run("--model", tiny_folder, *asked, *FEW) == 0
    printed = capsys.readouterr().out
    assert "dog\n" in printed and printed.count("probability of the not-found") == 2 and "confidence 0." in printed
    assert Image.open(picture).width >= 61
    assert run("--model", tiny_folder, "--image", photos / "a.png", "--prompt", " ", "--out", picture) == 2
    assert run("--model", tiny_folder, "--image", photos / "broken.jpg", "--prompt", "dog") == 2
    assert run("--model", tiny_folder, "--prompt", "dog") == 2
    assert "expected --image or --serve" in capsys.readouterr().err


def test_the_page_says_what_is_missing_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run("--model", tmp_path / "no model", "--serve") == 2
    assert 'needs uvicorn: pip install -e ".[serve]"' in capsys.readouterr().err


def test_the_page_needs_a_free_port(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run("--model", tiny_folder, "--serve", "--port", taken.getsockname()[1]) == 2
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err


@pytest.mark.parametrize("asked", ["red car, dog", "red car、dog", "red car，dog", "red car\ndog\n"])
def test_the_page_takes_targets_as_people_list_them(asked: str) -> None:
    assert question_on_page(asked, "targets").targets == ("red car", "dog")


@pytest.mark.parametrize(
    ("name", "found"), [("answers", "no ending"), ("a.txt", "the ending .txt"), ("sub", "a folder")]
)
def test_a_picture_that_cannot_be_written_is_reported_before_the_model_is_loaded(
    name: str, found: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--model", "gone", "--image", photos / "b.jpg", "--targets", "dog")
    assert run(*asked, "--out", photos / name) == 2
    error = capsys.readouterr().err
    assert f"--out {photos / name}: found {found}; expected a picture for one --image" in error
    assert run(*asked, "--out", photos / "new" / "a.jpg") == 2
    assert "--model gone: found no such folder" in capsys.readouterr().err


def test_a_photo_with_a_name_that_is_not_utf_8_is_named_as_such(tiny_folder: Path, tmp_path: Path) -> None:
    """As of an archive made on Chinese Windows."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    Image.new("RGB", (60, 40)).save(photos / os.fsdecode("狗".encode("gbk") + b".png"))
    asked = ("--model", tiny_folder, "--image", photos, "--targets", "dog", "--format", "labelme")
    assert run(*asked, "--out", out) == 2
    [line] = lines_of(out)
    assert "a file name that is not UTF-8; expected UTF-8. Rename the photo" in str(line)
