"""Conversations and box text as tools, translators and people write them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from case_files import CASES, build_case, write_photo
from format_files import read_all, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.formats.swift import read_swift
from cogvlm_ft.shards.packing.box_units import UnclearUnitError, survey_units
from cogvlm_ft.shards.packing.candidates import Candidate

UNCERTAIN = (13, 17, 18)  # lines of the case with numbers that are not padded, fractions, and more than three digits
NAMES = st.sampled_from(["dog", "the red car", "一只狗", "café", "a & b"])


def test_11_box_text_in_other_forms(tmp_path: Path, capsys: Any) -> None:
    found = build_case(CASES / "11-fullwidth/in/l.jsonl", tmp_path, capsys)
    reader = ShardReader(load_index(str(tmp_path), "train"))
    turns = reader.read(0).record.turns
    reader.close()
    lines = (CASES / "11-fullwidth/in/l.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [json.loads(line)["Prompt"] for i, line in enumerate(lines) if i not in UNCERTAIN]
    assert [turn.prompt for turn in turns] == kept
    assert {turn.answer.replace("坐标", "").rstrip("。") for turn in turns} == {"所在区域为[[086,540,400,760]]"}
    assert found.reasons == ["bad_box_text"] * 3 and found.noted == ["box_text_normalised"] * 19


@pytest.mark.parametrize(
    ("options", "box"), [(["pixel"], (86, 54, 400, 376)), (["thousandth"], (55.04, 25.92, 256, 180.48)), ([], None)]
)
def test_15_boxes_that_fit_two_units(tmp_path: Path, capsys: Any, options: list[str], box: Box | None) -> None:
    arguments = ["--box-unit", *options] if options else []
    found = build_case(CASES / "15-qwen25-absolute-small/in/l.jsonl", tmp_path, capsys, *arguments)
    if box:
        assert found.boxes == {"a": {"狗": (box,)}} and found.reasons == []
    else:
        assert found.code == 2 and "(86, 54, 400, 376) px as pixels" in found.printed
        assert "--box-unit pixel or --box-unit thousandth" in found.printed


def test_16_boxes_of_internvl(tmp_path: Path, capsys: Any) -> None:
    found = build_case(CASES / "16-internvl-box/in/l.jsonl", tmp_path, capsys)
    assert found.boxes == {"a": {"the dog": ((120, 180, 600, 540),)}} and found.reasons == found.noted == []


@pytest.mark.parametrize("name", ["l.json", "one.json", "pretty.json"])
def test_23_an_array_of_lines(tmp_path: Path, capsys: Any, name: str) -> None:
    found = build_case(CASES / "23-jsonl-array/in" / name, tmp_path, capsys)
    assert found.boxes == {key: {"dog": ((1, 2, 21, 12),)} for key in "abc"} and found.reasons == []


def test_34_placeholders_in_json(tmp_path: Path, capsys: Any) -> None:
    found = build_case(CASES / "34-swift-bbox2d/in/l.jsonl", tmp_path, capsys)
    assert found.boxes == {"a": {"羊": ((10, 8, 30, 24), (50, 8, 80, 24))}} and found.reasons == []


def test_34_thousandths_in_json(tmp_path: Path, capsys: Any) -> None:
    found = build_case(CASES / "34-swift-bbox2d/in/qwen3.jsonl", tmp_path, capsys)
    assert found.boxes == {"a": {"dog": ((10, 8, 30, 24),)}} and found.noted == ["box_unit_inferred"]


@st.composite
def objects(draw: st.DrawFn) -> list[tuple[str, list[list[int]]]]:
    """Phrases with boxes, some beyond 1000 pixels, of a photo of 1600 x 1200."""
    found = []
    for phrase in draw(st.lists(NAMES, min_size=1, max_size=3, unique=True)):
        boxes = []
        for _ in range(draw(st.integers(1, 3))):
            x0, y0 = draw(st.integers(0, 900)), draw(st.integers(0, 900))
            boxes.append([x0, y0, draw(st.integers(x0 + 1, 999)), draw(st.integers(y0 + 1, 999))])
        found.append((phrase, boxes))
    return found


def in_internvl(found: list[tuple[str, list[list[int]]]]) -> dict[str, Any]:
    answer = "，".join(f"<ref>{phrase}</ref><box>{json.dumps(boxes)}</box>" for phrase, boxes in found)
    return conversation("找到它们", answer)


def in_qwen(found: list[tuple[str, list[list[int]]]]) -> dict[str, Any]:
    boxes = [(phrase, "".join("<box>({},{}),({},{})</box>".format(*box) for box in boxes)) for phrase, boxes in found]
    return conversation("找到它们", "".join(f"<ref>{phrase}</ref>{box}" for phrase, box in boxes))


def in_json(found: list[tuple[str, list[list[int]]]]) -> dict[str, Any]:
    entries = [{"bbox_2d": box, "label": phrase} for phrase, boxes in found for box in boxes]
    return conversation("Locate them in JSON.", f"```json\n{json.dumps(entries, ensure_ascii=False)}\n```")


def in_swift(found: list[tuple[str, list[list[int]]]]) -> dict[str, Any]:
    pairs = [(phrase, box) for phrase, boxes in found for box in boxes]
    answer = ", ".join('{"bbox_2d": <bbox>, "label": "<ref-object>"}' for _ in pairs)
    refs, boxes = [phrase for phrase, _ in pairs], [box for _, box in pairs]
    return {
        **conversation("Locate them.", f"[{answer}]"),
        "objects": {"ref": refs, "bbox": boxes, "bbox_type": "norm1000"},
    }


def conversation(question: str, answer: str) -> dict[str, Any]:
    spoken = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}]
    return {"messages": spoken, "images": ["a.jpg"]}


@settings(max_examples=30)
@given(objects(), st.sampled_from([in_internvl, in_qwen, in_json, in_swift]))
def test_boxes_come_back_in_every_way_to_write_them(found: list[tuple[str, list[list[int]]]], write: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_lines(Path(folder) / "l.jsonl", [write(found)])
        reading = read_all(read_swift, path)
    expected = {phrase: tuple(tuple(box) for box in boxes) for phrase, boxes in found}
    assert reading.boxes == {"a.jpg": expected} and not reading.problems


@settings(max_examples=20)
@given(st.data(), st.sampled_from(["pixels", "thousandths"]), st.sampled_from([(640, 480), (1600, 1200), (375, 900)]))
def test_boxes_in_json_are_right_or_asked_for(data: st.DataObject, units: str, size: tuple[int, int]) -> None:
    limit = size if units == "pixels" else (1000, 1000)
    num_photos = data.draw(st.integers(1, 6))
    rows = []
    for i in range(num_photos):
        x0, y0 = data.draw(st.integers(0, limit[0] - 60)), data.draw(st.integers(0, limit[1] - 60))
        box = [x0, y0, data.draw(st.integers(x0 + 30, limit[0] - 1)), data.draw(st.integers(y0 + 30, limit[1] - 1))]
        rows.append({**in_json([("dog", [box])]), "images": [f"{i}.jpg"]})
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder)
        for i in range(num_photos):
            write_photo(images / f"{i}.jpg", size)
        parts = list(read_swift(write_lines(images / "l.jsonl", rows), images))
        survey = survey_units(parts, images)
    candidates = [part for part in parts if isinstance(part, Candidate)]
    assert len(candidates) == num_photos
    try:
        decided = survey.decide("auto", Path("l.jsonl"))
    except UnclearUnitError:
        return
    assert {decided.settle(candidate).units for candidate in candidates} == {units}
