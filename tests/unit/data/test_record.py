"""The JSON of a sample: round trip, and what is refused."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from typing import Any

import pytest

from cogvlm_ft.data.record import (
    BadSampleError,
    Record,
    box_defect,
    clip_box,
    detect_language,
    record_from_json,
    record_to_json,
)
from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Target, Turn

RECORD = Record(
    key="a",
    image_size_px=(40, 30),
    source="x.jsonl:1",
    targets=(Target("一只狗", "zh", ((1.0, 2.0, 20.5, 15.0),), "黑色"), Target("cat", "en", ())),
    turns=(Turn("prompt", "答案"),),
)


def changed(path: list[Any], value: Any) -> bytes:
    """Return the JSON of RECORD with one field replaced."""
    fields = json.loads(record_to_json(RECORD))
    place = fields
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return json.dumps(fields).encode()


def test_there_and_back() -> None:
    data = record_to_json(RECORD)
    assert record_from_json(data, "a") == RECORD
    assert "一只狗".encode() in data and b": " not in data and b", " not in data


def test_a_conversation_keeps_its_earlier_turns_and_others_their_bytes() -> None:
    record = Record("a", (4, 3), "", (), (Turn("one?", "1"), Turn("two?", "2", history=(("one?", "1"),))))
    data = record_to_json(record)
    assert record_from_json(data, "a") == record
    assert data.endswith(
        b'"turns":[{"prompt":"one?","answer":"1"},{"prompt":"two?","answer":"2","history":[["one?","1"]]}]}'
    )
    assert record_from_json(data.replace(b'[["one?","1"]]', b"null"), "a").turns[1].history == ()
    for spoiled, message in (
        (b'[["one?"]]', r"turns\[1\].history\[0\]: found"),
        (b'[["one?",1]]', r"history\[0\]\[1\]: found 1"),
    ):
        with pytest.raises(BadSampleError, match=message):
            record_from_json(data.replace(b'[["one?","1"]]', spoiled), "a")


def test_only_an_upright_record_says_so() -> None:
    assert b"upright" not in record_to_json(RECORD)
    upright = replace(RECORD, upright=True)
    assert record_to_json(upright) == record_to_json(RECORD)[:-1] + b',"upright":true}'
    assert record_from_json(record_to_json(upright), "a") == upright


def test_json_of_others_needs_targets_or_turns_only() -> None:
    data = b'{"targets": [{"phrase": "\xe7\x8b\x97", "boxes_xyxy": [[1, 2, 3, 4]]}], "url": "http://x", "width": 5}'
    assert record_from_json(data, "k") == Record("k", None, "", (Target("狗", "zh", ((1.0, 2.0, 3.0, 4.0),)),), ())
    assert record_from_json(b'{"turns": [{"prompt": "p", "answer": "q"}]}', "k").turns == (Turn("p", "q"),)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["image_size_px"], [40]),
        (["image_size_px"], [40, 0]),
        (["image_size_px"], [40.5, 30]),
        (["image_size_px"], "40x30"),
        (["source"], 7),
        (["upright"], 1),
        (["targets"], None),
        (["targets"], {}),
        (["targets", 0], "dog"),
        (["targets", 0, "phrase"], " "),
        (["targets", 0, "phrase"], None),
        (["targets", 0, "language"], "fr"),
        (["targets", 0, "language"], []),
        (["targets", 0, "description"], 3),
        (["targets", 0, "boxes_xyxy"], None),
        (["targets", 0, "boxes_xyxy", 0], [1, 2, 3]),
        (["targets", 0, "boxes_xyxy", 0], [1, 2, 3, "4"]),
        (["targets", 0, "boxes_xyxy", 0], [1, 2, 3, True]),
        (["targets", 0, "boxes_xyxy", 0], [1, 2, 3, float("nan")]),
        (["targets", 0, "boxes_xyxy", 0], [1, 2, 3, 10**400]),
        (["turns", 0], ["prompt", "answer"]),
        (["turns", 0, "answer"], ""),
        (["turns", 0, "history"], "earlier"),
    ],
)
def test_a_bad_field_is_named(path: list[Any], value: Any) -> None:
    field = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)[1:]
    with pytest.raises(DataError) as caught:
        record_from_json(changed(path, value), "my-key")
    assert (
        "my-key" in str(caught.value) and f"{field}: found " in str(caught.value) and "; expected " in str(caught.value)
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "bad_json"),
        (b"{", "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b'{"turns": "\xff"}', "bad_json"),
        (rb'{"turns": [{"prompt": "\ud800", "answer": "q"}]}', "bad_json"),
        (b"9" * 5000, "bad_json"),
        (b"[]", "bad_record"),
        (b"{}", "no_targets"),
        (b'{"targets": [], "turns": []}', "no_targets"),
    ],
)
def test_bytes_that_are_no_record(data: bytes, reason: str) -> None:
    with pytest.raises(BadSampleError) as caught:
        record_from_json(data, "k")
    assert (caught.value.key, caught.value.reason) == ("k", reason)


def test_captions_of_img2dataset_say_what_they_lack() -> None:
    data = b'{"caption": "a dog", "url": "http://host/a.jpg", "key": "000000001", "status": "success"}'
    with pytest.raises(BadSampleError) as caught:
        record_from_json(data, "000000001")
    assert caught.value.reason == "no_targets"
    assert caught.value.detail.endswith(
        "without boxes: annotate the images with boxes and write shards with shards/build.py"
    )


def test_the_error_survives_the_way_out_of_a_worker() -> None:
    error = pickle.loads(pickle.dumps(BadSampleError("k", "bad_json", "no")))
    assert isinstance(error, BadSampleError) and (error.key, error.reason, error.detail) == ("k", "bad_json", "no")


@pytest.mark.parametrize(
    ("box", "defect"),
    [
        ((0, 0, 40, 30), None),
        ((-1, -1, 41, 31), None),
        ((-1.01, 0, 10, 10), "box_outside_image"),
        ((0, 0, 41.01, 10), "box_outside_image"),
        ((0, 0, 10, 31.01), "box_outside_image"),
        ((5, 5, 5, 10), "zero_area"),
        ((40, 5, 40.5, 10), "zero_area"),
        ((6, 5, 5, 10), "inverted_box"),
        ((5, 11, 6, 10), "inverted_box"),
    ],
)
def test_box_defects(box: Any, defect: str | None) -> None:
    assert box_defect(box, (40, 30)) == defect


def test_clipped_boxes_stay_inside() -> None:
    assert clip_box((-1, -0.5, 41, 30.5), (40, 30)) == (0, 0, 40, 30)
    assert clip_box((1.5, 2, 3, 4), (40, 30)) == (1.5, 2, 3, 4)


@pytest.mark.parametrize(("text", "language"), [("狗", "zh"), ("a 狗", "zh"), ("dog", "en"), ("", "en"), ("é", "en")])
def test_language(text: str, language: str) -> None:
    assert detect_language(text) == language
