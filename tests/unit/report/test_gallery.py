"""Which photos are shown, and with which boxes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.errors import DataError
from cogvlm_ft.evaluate.evaluate import Evaluation, Prediction, save_evaluation
from cogvlm_ft.evaluate.results import former_evaluation
from cogvlm_ft.grounding.metrics import AnswerScore
from cogvlm_ft.report.gallery import (
    TABLE_COLUMNS,
    Answered,
    Picture,
    choose,
    load_pictures,
    read_predictions,
    right_boxes,
    save_gallery,
    table_rows,
)
from cogvlm_ft.report.wandb_media import boxed_image, save_pictures
from cogvlm_ft.run_folder import RunFolder

BOX = (10.0, 10.0, 30.0, 30.0)


def answered(key: str, score: float | None, turn: int = 0, kind: str = "present", **fields: Any) -> Answered:
    texts = {"prompt": f"question {turn}", "answer": "[[1,2,3,4]]", "truth": "[[1,2,3,4]]"}
    boxes = {"boxes_xyxy": (BOX,), "truth_boxes_xyxy": (BOX,), "image_size_px": (56, 56)}
    return Answered(key, turn, kind=kind, score=score, **{**texts, **boxes, **fields})


def test_the_same_photos_are_the_first_ones_and_the_worst_those_with_the_lowest_mean() -> None:
    scores = {"a": [0.9, 0.8], "b": [1.0, 1.0], "c": [0.1, 0.2], "d": [0.6, None], "e": [None], "f": [0.0, 0.1]}
    predictions = [answered(key, score, turn) for key, of in scores.items() for turn, score in enumerate(of)]
    chosen = choose(predictions, [], num_photos=3)
    assert chosen.same == ["a", "b", "c"]
    assert chosen.worst == ["f", "c", "d"]
    assert choose(predictions, [], num_photos=10).worst == ["f", "c", "d", "a"]  # b is perfect, e is not scored
    assert choose(predictions, [], num_photos=0) == choose([], [], num_photos=3) == type(chosen)([], [], [])


def test_newly_lost_are_those_that_were_right_and_are_wrong() -> None:
    before = [answered(key, score, turn) for key, turn, score in
              (("a", 0, 0.9), ("b", 0, 0.2), ("c", 0, 0.5), ("c", 1, 1.0), ("d", 0, 0.9), ("e", 0, 0.9))]  # fmt: skip
    now = [answered(key, score, turn) for key, turn, score in
           (("a", 0, 0.49), ("b", 0, 0.1), ("c", 0, 0.0), ("c", 1, 0.0), ("d", 0, 0.5), ("e", 0, None))]  # fmt: skip
    assert choose(now, before, num_photos=9).newly_lost == ["c", "a"]  # c lost two answers
    assert choose(now, before, num_photos=1).newly_lost == ["c"]
    other = [answered("a", 0.0, prompt="another question")]
    assert choose(other, before, num_photos=9).newly_lost == []
    assert choose(now, [], num_photos=9).newly_lost == []


def test_every_box_of_an_answer_needs_a_true_box_of_its_own() -> None:
    near, far = (12.0, 10.0, 30.0, 30.0), (40.0, 40.0, 50.0, 50.0)
    assert right_boxes(answered("a", 1.0, boxes_xyxy=(near, far))) == [True, False]
    assert right_boxes(answered("a", 1.0, boxes_xyxy=(near, BOX))) == [False, True]
    assert right_boxes(answered("a", 0.0, truth_boxes_xyxy=())) == [False]
    assert right_boxes(answered("a", 0.0, boxes_xyxy=(), truth_boxes_xyxy=())) == []


def test_the_table_is_bounded_half_the_same_and_half_the_worst() -> None:
    predictions = [answered(f"{number:03}", score=number / 100) for number in range(100)]
    predictions[99] = answered("099", 0.0, kind="absent")
    rows = table_rows(predictions, 10)
    assert [row[0] for row in rows] == [*(f"{number:03}" for number in range(5)), "099", "005", "006", "007", "008"]
    assert rows[5] == ["099", "question 0", "[[1,2,3,4]]", "[[1,2,3,4]]", "absent", 0.0, "wrong"]
    assert all(len(row) == len(TABLE_COLUMNS) for row in rows)
    assert [row[-1] for row in table_rows([answered("a", None, kind="text"), answered("b", 0.5)], 200)] == [
        "not scored",
        "right",
    ]
    assert table_rows([], 10) == []


def prediction(key: str, score: AnswerScore | None, **fields: Any) -> Prediction:
    known = {"prompt": "?", "answer": "!", "truth": "!", "boxes_xyxy": [BOX], "truth_boxes_xyxy": [BOX]}
    return Prediction(key, 0, image_size_px=(112, 56), score=score, **{**known, **fields})


def test_an_evaluation_is_read_back(tmp_path: Path) -> None:
    predictions = [
        prediction("a", AnswerScore("present", iou=0.7)),
        prediction("b", AnswerScore("absent", said_not_found=True), boxes_xyxy=None, truth_boxes_xyxy=[]),
        prediction("c", AnswerScore("text", exact=True), boxes_xyxy=None, truth_boxes_xyxy=None),
        prediction("d", None),
    ]
    save_evaluation(Evaluation({}, predictions, []), tmp_path)
    found = read_predictions(tmp_path / "predictions.jsonl")
    assert [(each.key, each.kind, each.score) for each in found] == [
        ("a", "present", 0.7),
        ("b", "absent", 1.0),
        ("c", "text", None),
        ("d", "", None),
    ]
    assert found[0].boxes_xyxy == found[0].truth_boxes_xyxy == (BOX,)
    assert found[1].boxes_xyxy == found[1].truth_boxes_xyxy == ()
    (tmp_path / "predictions.jsonl").write_text('{"key": "a"}\n')
    with pytest.raises(DataError, match=r"predictions\.jsonl cannot be read \(KeyError"):
        read_predictions(tmp_path / "predictions.jsonl")


@pytest.fixture
def reader(shards: Path) -> ShardReader:
    return ShardReader(load_index(shards, "val"))


def test_photos_are_kept_once_and_shown_with_their_boxes(reader: ShardReader, tmp_path: Path) -> None:
    keys = [reader.index.key(i) for i in range(4)]
    folder = tmp_path / "step-00000002"
    folder.mkdir()
    half = {"image_size_px": (112, 112)}  # as if the stored photo were twice as large as the file here
    predictions = [answered(key, 0.2, **half) for key in keys]
    save_gallery(choose(predictions, [], num_photos=2), folder, reader)
    photos = sorted((tmp_path / "photos").iterdir())
    assert len(photos) == 2 and all(path.suffix == ".jpg" for path in photos)
    pictures = load_pictures(folder, predictions)
    assert [picture.key for picture in pictures["same"]] == [picture.key for picture in pictures["worst"]] == keys[:2]
    assert pictures["newly_lost"] == []
    shown = pictures["same"][0]
    assert shown.truth == [((5.0, 5.0, 15.0, 15.0), "question 0")]
    assert shown.answers == [((5.0, 5.0, 15.0, 15.0), "question 0", True)]
    assert shown.caption == "question 0 -> [[1,2,3,4]]"
    kept, original = Image.open(shown.photo), reader.read(0).image
    assert kept.size == original.size
    small = [image.resize((4, 4)).tobytes() for image in (kept, original)]
    assert max(abs(a - b) for a, b in zip(*small, strict=True)) < 40  # JPEG, but this photo

    written = {path: path.stat().st_mtime_ns for path in photos}
    later = tmp_path / "step-00000004"
    later.mkdir()
    save_gallery(choose(predictions, [], num_photos=3), later, reader)
    assert len(list((tmp_path / "photos").iterdir())) == 3
    assert {path: path.stat().st_mtime_ns for path in photos} == written
    shown.photo.unlink()
    assert [picture.key for picture in load_pictures(later, predictions)["same"]] == keys[1:3]


def test_a_picture_for_wandb_has_a_class_for_each_box() -> None:
    picture = Picture("a", Path("a.jpg"), "caption", [(BOX, "1")], [(BOX, "1", True), (BOX, "2", False)])
    image = boxed_image(picture)
    assert (image.path, image.caption) == (Path("a.jpg"), "a: caption")
    named = {group: [(label, image.classes[of]) for _, label, of in boxes] for group, boxes in image.boxes.items()}
    assert named == {"truth": [("1", "truth")], "answers": [("1", "right answer"), ("2", "wrong answer")]}


def test_a_large_photo_is_shrunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: ShardReader) -> None:
    monkeypatch.setattr("cogvlm_ft.report.gallery.LONGER_SIDE_PX", 28)
    folder = tmp_path / "step-00000000"
    folder.mkdir()
    predictions = [answered(reader.index.key(0), 0.5)]
    save_gallery(choose(predictions, [], num_photos=1), folder, reader)
    (picture,) = load_pictures(folder, predictions)["same"]
    assert Image.open(picture.photo).size == (28, 28)
    assert picture.truth[0][0] == (5.0, 5.0, 15.0, 15.0)


def test_a_photo_that_cannot_be_read_any_more_is_left_out(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(shards, tmp_path / "shards")
    index = load_index(tmp_path / "shards", "val")
    last = len(index) - 1
    path = Path(index.shard_paths[int(index.shard_number[last])])
    content = path.read_bytes()
    offset = int(index.image_offset[last])
    path.write_bytes(content[:offset] + bytes(100) + content[offset + 100 :])
    reader = ShardReader(load_index(tmp_path / "shards", "val"))
    predictions = [answered(key, 0.5) for key in (reader.index.key(0), reader.index.key(last), "not there")]
    folder = tmp_path / "step-00000000"
    folder.mkdir()
    save_gallery(choose(predictions, [], num_photos=3), folder, reader)
    assert [picture.key for picture in load_pictures(folder, predictions)["same"]] == [reader.index.key(0)]
    assert "cannot be shown" in caplog.text and reader.index.key(last) in caplog.text


def test_without_a_gallery_the_drawn_pictures_are_shown(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "00-a.png")
    (picture,) = load_pictures(tmp_path, [])["same"]
    assert (picture.key, picture.photo.name, list(picture.truth)) == ("00-a", "00-a.png", [])
    (tmp_path / "gallery.json").write_text(json.dumps({"groups": {}}))
    with pytest.raises(DataError, match=r"gallery\.json cannot be read"):
        load_pictures(tmp_path, [])


def test_photos_that_the_evaluation_before_had_right_are_found(reader: ShardReader, tmp_path: Path) -> None:
    keys = [reader.index.key(i) for i in range(3)]
    for step, ious in ((0, [0.9, 0.9, 0.1]), (10, [0.8, 0.2, 0.1]), (20, [0.3, 0.9, 0.9])):
        folder = RunFolder(tmp_path).evaluation(step)
        predictions = [prediction(key, AnswerScore("present", iou)) for key, iou in zip(keys, ious, strict=True)]
        save_evaluation(Evaluation({}, predictions, []), folder)
        save_pictures(folder, reader, num_photos=1)
    found = [json.loads((RunFolder(tmp_path).evaluation(step) / "gallery.json").read_text()) for step in (0, 10, 20)]
    assert [gallery["groups"]["newly_lost"] for gallery in found] == [[], [keys[1]], [keys[0]]]
    assert [gallery["groups"]["same"] for gallery in found] == [[keys[0]]] * 3
    (RunFolder(tmp_path).evaluation(10) / "predictions.jsonl").write_text("{")
    save_pictures(RunFolder(tmp_path).evaluation(20), reader, num_photos=1)  # a broken file ends nothing
    gallery = json.loads((RunFolder(tmp_path).evaluation(20) / "gallery.json").read_text())
    assert gallery["groups"]["newly_lost"] == []


def test_the_former_evaluation_is_the_last_one_before(tmp_path: Path) -> None:
    for name in ("step-00000000", "step-00000100", "step-00000300", "photos"):
        (tmp_path / name).mkdir()
    assert former_evaluation(tmp_path / "step-00000300") == tmp_path / "step-00000100"
    assert former_evaluation(tmp_path / "step-00000200") == tmp_path / "step-00000100"
    assert former_evaluation(tmp_path / "step-00000000") is None
