"""Conversations with boxes of ms-swift and Qwen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from format_files import Reading, read_all, write_json, write_lines

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Turn
from cogvlm_ft.shards.formats import recognise_format
from cogvlm_ft.shards.formats.swift import read_swift, recognise_swift


def read(tmp_path: Path, *lines: Any) -> Reading:
    return read_all(read_swift, write_lines(tmp_path / "x.jsonl", list(lines)))


def row(question: str, answer: str, *, image: str = "a.jpg", objects: Any = None, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [image], **({} if objects is None else {"objects": objects}), **more}


SHEEP = row(
    "<image>找到图像中的<ref-object>",
    "<bbox><bbox>",
    objects={"ref": ["羊"], "bbox": [[90.9, 160.8, 135, 212.8], [360.9, 480.8, 495, 532.8]]},
)
BEACH = row(
    "<image>描述图像",
    "<ref-object><bbox>和<ref-object><bbox>正在沙滩上玩耍",
    image="b.jpg",
    objects={"ref": ["一只狗", "一个女人"], "bbox": [[331.5, 761.4, 853.5, 1594.8], [676.5, 685.8, 1099.5, 1427.4]]},
)
TALK = row("<image>\nWhat is it?", "A dog.", image="c.jpg")
FOUND = {
    "a.jpg": {"羊": ((90.9, 160.8, 135, 212.8), (360.9, 480.8, 495, 532.8))},
    "b.jpg": {"一只狗": ((331.5, 761.4, 853.5, 1594.8),), "一个女人": ((676.5, 685.8, 1099.5, 1427.4),)},
    "c.jpg": {},
}


def test_placeholders_become_targets_and_text_stays(tmp_path: Path) -> None:
    for path in (
        write_lines(tmp_path / "x.jsonl", [SHEEP, BEACH, TALK]),
        write_json(tmp_path / "x.json", [SHEEP, BEACH, TALK]),
    ):
        found = read_all(read_swift, path)
        assert found.boxes == FOUND and not found.problems
        assert found.turns == [Turn("What is it?", "A dog.")]
        assert {candidate.units for candidate in found.candidates} == {"pixels"}


@pytest.mark.parametrize("image", ["a.jpg", {"url": "a.jpg"}])
@pytest.mark.parametrize("is_listed", [False, True])
def test_contents_of_parts(tmp_path: Path, image: Any, is_listed: bool) -> None:
    kind = "image" if isinstance(image, str) else "image_url"
    parts = [{"type": kind, kind: image}, {"type": "text", "text": "What is it?"}]
    answer = [{"type": "text", "text": "A dog."}]
    line = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]}
    found = read(tmp_path, line | ({"images": ["a.jpg"]} if is_listed else {}))
    assert found.only.image == "a.jpg" and found.turns == [Turn("What is it?", "A dog.")] and not found.problems
    line["messages"][0]["content"] = [*parts, {"type": kind, kind: "b.jpg"}]
    with pytest.raises(DataError, match="2 images"):
        read(tmp_path, line)


def test_pairs_of_llama_factory(tmp_path: Path) -> None:
    line = {"instruction": "<image>Find", "input": "<ref>the dog</ref>", "output": "<box>(1,2),(3,4)</box>"}
    path = write_json(tmp_path / "x.json", [line | {"images": ["a.jpg"]}])
    assert recognise_format(path)[0] == "swift"
    assert read_all(read_swift, path).boxes == {"a.jpg": {"the dog": ((1, 2, 3, 4),)}}


@pytest.mark.parametrize(
    ("bbox_type", "units"), [("real", "pixels"), ("norm1", "unit"), ("norm1000", "thousandths"), (None, "pixels")]
)
def test_units(tmp_path: Path, bbox_type: Any, units: str) -> None:
    objects = {"ref": ["dog"], "bbox": [[0.1, 0.2, 0.3, 0.4]], "bbox_type": bbox_type, "image_id": [0]}
    found = read(tmp_path, row("<image>Find <ref-object>", "<bbox>", objects=objects))
    assert found.only.units == units and found.boxes == {"a.jpg": {"dog": ((0.1, 0.2, 0.3, 0.4),)}}


@pytest.mark.parametrize(
    "line",
    [
        {
            "query": "<image>框出图中<ref>击掌</ref>的位置",
            "response": "<ref>击掌</ref><box>(536,509),(588,602)</box>",
            "images": ["a.jpg"],
        },
        {
            "id": "identity_0",
            "conversations": [
                {"from": "user", "value": "Picture 1: <img>a.jpg</img>\n框出图中击掌的位置"},
                {"from": "assistant", "value": "<ref>击掌</ref><box>(536,509),(588,602)</box>"},
            ],
        },
        {
            "image": "a.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\n<ref>击掌</ref>在哪里?"},
                {"from": "gpt", "value": "它在<box> (536, 509), (588, 602) </box>。"},
            ],
        },
        row(
            "<|object_ref_start|>击掌<|object_ref_end|>",
            "<|box_start|>(536,509),(588,602)<|box_end|>",
            system="You are a helpful assistant.",
        ),
        row("<box>(536,509),(588,602)</box>里是什么?", "<ref>击掌</ref>", image={"path": "./a.jpg", "bytes": None}),  # type: ignore[arg-type]
        {
            "query": "找<ref-object>",
            "response": "<bbox>",
            "images": "a.jpg",
            "objects": json.dumps(
                [{"caption": "击掌", "bbox": [536, 509, 588, 602], "bbox_type": "norm_1000", "image": 0}]
            ),
        },
    ],
)
def test_older_forms_in_thousandths(tmp_path: Path, line: Any) -> None:
    found = read(tmp_path, line)
    assert found.boxes == {"a.jpg": {"击掌": ((536, 509, 588, 602),)}}
    assert found.only.units == "thousandths" and not found.problems and not found.turns


def json_answer(*entries: dict[str, Any], fence: bool = True) -> str:
    text = json.dumps(list(entries), ensure_ascii=False, indent=1)
    return f"```json\n{text}\n```" if fence else text


@pytest.mark.parametrize(
    ("question", "answer", "boxes"),
    [
        ("Find <ref>a</ref>", "<ref>a</ref><box>[[100, 200, 500, 600]]</box>", {"a": ((100, 200, 500, 600),)}),
        (
            "Find them",
            "<ref>a</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box> and <ref>b</ref><box>[9, 9, 10, 10]</box>.",
            {"a": ((1, 2, 3, 4), (5, 6, 7, 8)), "b": ((9, 9, 10, 10),)},
        ),
        ("Find <ref>狗</ref>", "<box>［［１，２，３，４］］</box>", {"狗": ((1, 2, 3, 4),)}),
        ("Find <ref>狗</ref>", "<box>（１，２），（３，４）</box>", {"狗": ((1, 2, 3, 4),)}),
    ],
)
def test_boxes_of_internvl(tmp_path: Path, question: str, answer: str, boxes: Any) -> None:
    found = read(tmp_path, row(question, answer))
    assert found.boxes == {"a.jpg": boxes} and not found.problems and not found.turns
    assert (found.only.units, found.only.unit_basis) == ("thousandths", "documented")


DOG, CAT = {"bbox_2d": [10, 20, 30, 40], "label": "dog"}, {"bbox_2d": [1.5, 2, 3, 4], "label": "cat"}


@pytest.mark.parametrize(
    ("question", "answer", "boxes"),
    [
        ("Locate all", json_answer(DOG, CAT, DOG), {"dog": ((10, 20, 30, 40),) * 2, "cat": ((1.5, 2, 3, 4),)}),
        ("Locate all", json_answer(DOG, fence=False), {"dog": ((10, 20, 30, 40),)}),
        ("Locate all", json.dumps(DOG), {"dog": ((10, 20, 30, 40),)}),
        ("Locate all", f"Here they are:\n{json_answer(CAT)}\nThat is all.", {"cat": ((1.5, 2, 3, 4),)}),
        ('As [{"bbox_2d": [x1, y1, x2, y2], "label": "..."}]', json_answer(CAT), {"cat": ((1.5, 2, 3, 4),)}),
        ("Where is <ref>the dog</ref>?", json_answer({"bbox_2d": [1, 2, 3, 4]}), {"the dog": ((1, 2, 3, 4),)}),
        ("Where is <ref>the dog</ref>?", json_answer(), {"the dog": ()}),
        ("?", json_answer({"bbox": [[1, 2, 3, 4], [5, 6, 7, 8]], "name": "x"}), {"x": ((1, 2, 3, 4), (5, 6, 7, 8))}),
    ],
)
def test_boxes_in_json(tmp_path: Path, question: str, answer: str, boxes: Any) -> None:
    found = read(tmp_path, row(question, answer))
    assert found.boxes == {"a.jpg": boxes} and not found.problems and not found.turns
    if any(boxes.values()):
        assert found.only.unit_basis == "unknown"


@pytest.mark.parametrize("slot", ["<bbox>", '"<bbox>"'])
def test_placeholders_in_json(tmp_path: Path, slot: str) -> None:
    text = f'[\n\t{{"bbox_2d": {slot}, "label": "<ref-object>"}},\n\t{{"bbox_2d": {slot}, "label": "<ref-object>"}}]'
    objects = {"ref": ["羊", 'a "b"\\', "羊"], "bbox": [[10, 8, 30, 24], [50, 8, 80, 24]]}
    found = read(tmp_path, row("找到<ref-object>", text, objects=objects))
    assert found.boxes == {"a.jpg": {'a "b"\\': ((10, 8, 30, 24),), "羊": ((50, 8, 80, 24),)}} and not found.problems
    assert (found.only.units, found.only.unit_basis) == ("pixels", "documented")


def test_a_lost_box_in_json_is_reported(tmp_path: Path) -> None:
    answer = json_answer({**DOG, "bbox_2d": [1, 2, 3]}, {**DOG, "bbox_2d": "x"}, CAT)
    found = read(tmp_path, row("?", answer))
    assert found.reasons == [
        ("box", "wrong_number_of_coordinates"),
        ("box", "bad_field"),
        ("target", "no_boxes_left"),
    ]
    assert found.boxes == {"a.jpg": {"cat": ((1.5, 2, 3, 4),)}}


def test_a_list_of_objects_serves_for_phrase_and_box(tmp_path: Path) -> None:
    """As in ms-swift 2: the box in the question and the phrase in the answer, or the other way round."""
    objects = [{"caption": "guy in red", "bbox": [138, 136, 235, 359], "bbox_type": "real", "image": 0}]
    for question, answer in (("Find <bbox>", "<ref-object>"), ("Find <ref-object>", "<bbox>")):
        found = read(tmp_path, {"query": question, "response": answer, "images": ["a.jpg"], "objects": objects})
        assert found.boxes == {"a.jpg": {"guy in red": ((138, 136, 235, 359),)}} and not found.problems


def test_several_phrases_take_the_boxes_in_their_order(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        row("<ref>dog</ref> and <ref>cat</ref>?", "<box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>"),
        row("?", "<ref>dog</ref> <ref>car</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>", image="b.jpg"),
        row("?", "<ref>x</ref><box>(1,2),(3,4)</box><ref>x</ref><box>(5,6),(7,8)</box>", image="c.jpg"),
    )
    assert not found.problems
    assert found.boxes == {
        "a.jpg": {"dog": ((1, 2, 3, 4),), "cat": ((5, 6, 7, 8),)},
        "b.jpg": {"car": ((1, 2, 3, 4), (5, 6, 7, 8))},
        "c.jpg": {"x": ((1, 2, 3, 4), (5, 6, 7, 8))},
    }


def test_a_long_conversation_keeps_its_order(tmp_path: Path) -> None:
    line = {
        "query": "<ref>狗</ref>呢?",
        "response": "<box>(1,2),(3,4)</box>",
        "history": [["一?", "1"], ["二?", "2 [[001,002,003,004]]"]],
        "images": ["a.jpg"],
        "system": "s",
    }
    found = read(tmp_path, line)
    second = Turn("二?", "2 [[001,002,003,004]]", history=(("一?", "1"),))
    assert found.turns == [Turn("一?", "1"), second] and not found.problems
    assert found.boxes == {"a.jpg": {"狗": ((1, 2, 3, 4),)}}


def test_a_conversation_without_end_is_cut(tmp_path: Path) -> None:
    found = read(tmp_path, {**TALK, "messages": row("?", ".")["messages"] * 1000})
    assert len(found.turns) == 51 and len(found.turns[-1].history) == 50
    assert found.reasons == [("turn", "long_conversation")] * 949


def test_lines_of_one_image_come_together(tmp_path: Path) -> None:
    found = read(tmp_path, SHEEP, BEACH, row("Why?", "So."), {**TALK, "images": ["./a.jpg"]})
    assert [candidate.image for candidate in found.candidates] == ["a.jpg", "b.jpg"]
    assert found.candidates[0].turns == (Turn("Why?", "So."), Turn("What is it?", "A dog."))
    assert len(found.candidates[0].targets) == 1 and not found.problems


def test_boxes_in_other_units_for_the_same_image_are_a_contradiction(tmp_path: Path) -> None:
    found = read(tmp_path, TALK, SHEEP, row("<ref>dog</ref>?", "<box>(1,2),(3,4)</box>"), row("Why?", "So."))
    assert found.reasons == [("target", "contradiction")] and "thousandths" in found.problems[0].detail
    assert found.boxes["a.jpg"] == FOUND["a.jpg"] and Turn("Why?", "So.") in found.turns


def test_thousandths_of_several_marks_for_the_same_image_stay_together(tmp_path: Path) -> None:
    rows = (
        row("<ref>dog</ref>?", "<box>(1,2),(3,4)</box>"),
        row("<ref>cat</ref>?", "<|box_start|>(5,6),(7,8)<|box_end|>"),
    )
    for lines in (rows, rows[::-1]):
        found = read(tmp_path, *lines)
        assert found.boxes == {"a.jpg": {"dog": ((1, 2, 3, 4),), "cat": ((5, 6, 7, 8),)}} and not found.problems
        assert (found.only.units, found.only.unit_basis) == ("thousandths", "unknown")
    stated = {"ref": ["cow"], "bbox": [[1, 2, 3, 4]], "bbox_type": "norm1000"}
    found = read(tmp_path, rows[1], row("<ref-object>?", "<bbox>", objects=stated))
    assert found.reasons == [("target", "contradiction")] and "thousandths (assumed)" in found.problems[0].detail


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("Where is the dog?", "<box>(1,2),(3,4)</box>", "boxes_without_phrase"),
        ("<ref>a</ref> <ref>b</ref>?", "<box>(1,2),(3,4)</box>", "boxes_without_phrase"),
        ("What is in <box>(1,2),(3,4)</box>?", "A dog.", "boxes_without_phrase"),
        ("Like <box>(1,2),(3,4)</box>?", "<ref>a</ref><box>(1,2),(3,4)</box>", "boxes_without_phrase"),
        ("?", "<box>(1,2),(3,4)</box><ref>a</ref>", "boxes_without_phrase"),
        ("Where?", "At [1, 2, 3, 4].", "bad_box_text"),
        ("Where?", "(1,2),(3,4)", "bad_box_text"),
        ("Where?", '```json\n[{"bbox_2d": [1, 2, 3, 4]}]\n```', "boxes_without_phrase"),
        ("Where?", '```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "dog"', "bad_box_text"),
        ("Where?", '[{"box_2d": [1, 2, 3, 4], "label": "dog"}]', "bad_box_text"),
        (
            "Where?",
            '{"bbox_2d": [1, 2, 3, 4], "label": "dog"} {"bbox_2d": [1, 2, 3, 4], "label": "cat"}',
            "bad_box_text",
        ),
        ("Where?", "```json\n[]\n```", "boxes_without_phrase"),
        ("Where?", "<quad>(1,2),(3,4),(5,6),(7,8)</quad>", "bad_box_text"),
        ("Where?", "<box>(1,2),(3,4)", "bad_box_text"),
        ("In [[1,2,3,4]]?", "A dog.", "bad_box_text"),
        ("<ref>a</ref> not in [1,2,3,4]?", "<box>(1,2),(3,4)</box>", "bad_box_text"),
        ("Where?", "[[1, 2, 3, 4]]", "bad_box_text"),
        ("Where?", "", "bad_field"),
        ("<image>", "A caption.", "bad_field"),
    ],
)
def test_boxes_that_are_not_understood_are_never_passed_on(
    tmp_path: Path, question: str, answer: str, reason: str
) -> None:
    found = read(tmp_path, row(question, answer), TALK)
    assert found.reasons == [("turn", reason)]
    assert found.turns == [Turn("What is it?", "A dog.")] and not any(found.boxes.values())
    assert found.problems[0].source == "x.jsonl:1"


def objects_of(**changes: Any) -> dict[str, Any]:
    return {**SHEEP, "objects": {**SHEEP["objects"], **changes}}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({**SHEEP, "images": ["a.jpg", "b.jpg"]}, "several_images"),
        ({**SHEEP, "images": []}, "bad_field"),
        ({**SHEEP, "images": [7]}, "bad_field"),
        ({**SHEEP, "images": [{"bytes": "..."}]}, "bad_field"),
        ({**SHEEP, "videos": ["a.mp4"]}, "several_images"),
        (row("<image><image>Differ?", "Yes."), "several_images"),
        (row("<img>b.jpg</img>Differ?", "Yes."), "several_images"),
        (objects_of(image_id=[0, 1]), "bad_field"),
        (objects_of(bbox_type="yolo"), "bad_field"),
        (objects_of(bbox_type=["real"]), "bad_field"),
        (objects_of(ref=[7]), "bad_field"),
        (objects_of(ref=[]), "placeholder_count"),
        (objects_of(ref=["a", "b"]), "placeholder_count"),
        (objects_of(bbox=[[1, 2, 3, 4]]), "placeholder_count"),
        (objects_of(bbox=[[1, 2, 3, 4]] * 3), "placeholder_count"),
        (objects_of(bbox="[[1, 2, 3, 4]]"), "bad_field"),
        ({**SHEEP, "objects": "{"}, "bad_json"),
        ({**SHEEP, "objects": 7}, "bad_field"),
        ({**SHEEP, "objects": [7]}, "bad_field"),
        ({**SHEEP, "objects": "[" * 500 + "]" * 500}, "bad_field"),
        ({**TALK, "objects": [{"caption": "dog", "bbox": [1, 2, 3, 4]}]}, "placeholder_count"),
        (
            row(
                "<ref-object> <ref>b</ref>?",
                "<bbox><box>(1,2),(3,4)</box>",
                objects={"ref": ["a"], "bbox": [[1, 2, 3, 4]]},
            ),
            "mixed_units",
        ),
        ({"images": ["a.jpg"]}, "bad_field"),
        ({"images": ["a.jpg"], "messages": "x"}, "bad_field"),
        ({"images": ["a.jpg"], "messages": ["x"]}, "bad_field"),
        ({"images": ["a.jpg"], "query": "q", "response": "r", "history": ["x"]}, "bad_field"),
        (b"{", "bad_json"),
    ],
)
def test_a_bad_row_is_lost_alone(tmp_path: Path, line: Any, reason: str) -> None:
    found = read(tmp_path, line, TALK, BEACH)
    assert found.reasons == [("sample", reason)], found.problems
    assert found.problems[0].source == "x.jsonl:1"
    assert [candidate.image for candidate in found.candidates] == ["c.jpg", "b.jpg"]


def test_a_bad_box_is_lost_alone(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        objects_of(bbox=[[1, 2, 3], [1, 2, 3, 4]]),
        objects_of(bbox=[[615, 226], "x"]),
        row("<ref>dog</ref>?", "<box>[[1, 2, 3, 4</box><box>(1,2),(3,4)</box>", image="b.jpg"),
    )
    assert [reason for _, reason in found.reasons] == [
        "wrong_number_of_coordinates",
        "wrong_number_of_coordinates",
        "bad_field",
        "no_boxes_left",
        "bad_field",
    ]
    assert found.boxes == {"a.jpg": {"羊": ((1, 2, 3, 4),)}, "b.jpg": {"dog": ((1, 2, 3, 4),)}}


@pytest.mark.parametrize(
    "messages", [[("user", "a")], [("assistant", "a")], [("user", 7)], [("tool", "a")], [(None, "a")]]
)
def test_messages_without_partner_are_reported(tmp_path: Path, messages: Any) -> None:
    spoken = [{"role": role, "content": text} for role, text in messages]
    found = read(tmp_path, {**TALK, "messages": [{"role": "system", "content": "s"}, *spoken, *TALK["messages"]]})
    assert len(found.problems) == 1 and found.problems[0].level == "turn"
    assert found.turns == [Turn("What is it?", "A dog.")]


@pytest.mark.slow
def test_unclosed_marks_take_no_time(tmp_path: Path) -> None:
    pieces = ("<ref>", "<box>", "<img>", "<box>(1", "Picture 1: ", "[[", "<image", "<|box_start|>")
    found = read(tmp_path, *(row(piece * 20_000, piece * 20_000) for piece in pieces), TALK)
    assert len(found.turns) + len(found.problems) == len(pieces) + 1


def test_nothing_usable_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'none of its 1 lines can be used; expected one JSON object with "messages"'):
        read(tmp_path, {"a": 1})


def test_recognise(tmp_path: Path) -> None:
    assert recognise_swift(write_lines(tmp_path / "x", [SHEEP])) == 'ms-swift / Qwen conversations in "messages"'
    assert recognise_swift(write_json(tmp_path / "x", [{"conversations": []}])) is not None
    assert recognise_swift(write_lines(tmp_path / "x", [{"query": "", "response": ""}])) is not None
    assert recognise_swift(write_lines(tmp_path / "x", [{"image": "a.jpg", "targets": []}])) is None
    assert recognise_swift(tmp_path) is None
