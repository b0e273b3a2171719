"""JSON lines: our form, and the guide's pairs of question and answer."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from format_files import Reading, read_all, write_lines

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Turn
from cogvlm_ft.shards.formats import rows
from cogvlm_ft.shards.formats.jsonl import read_jsonl, recognise_jsonl
from cogvlm_ft.shards.packing.candidates import Candidate

OURS = {"image": "a.jpg", "targets": [{"phrase": "dog", "boxes": [[1, 2, 30, 40]]}]}
PAIR = {"image": "a.jpg", "Prompt": "狗在哪里?", "Label": "图片中存在一只狗,所在区域为[[086,540,400,760]]"}


def read(tmp_path: Path, *lines: Any) -> Reading:
    return read_all(read_jsonl, write_lines(tmp_path / "x.jsonl", list(lines)))


def test_pairs_are_used_as_they_stand_whatever_the_capitals(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        PAIR,
        {
            "Image": "b.jpg",
            "prompt": " Where is <it>? answer in [[x0,y0,x1,y1]] format. ",
            "LABEL": "[[000,000,998,997]]",
        },
        {"image_path": "c.jpg", "PROMPT": "一共几只?", "label": "**两只**,见[1]"},
    )
    assert not found.problems
    assert [(candidate.image, candidate.turns) for candidate in found.candidates] == [
        ("a.jpg", (Turn(PAIR["Prompt"], PAIR["Label"]),)),
        ("b.jpg", (Turn(" Where is <it>? answer in [[x0,y0,x1,y1]] format. ", "[[000,000,998,997]]"),)),
        ("c.jpg", (Turn("一共几只?", "**两只**,见[1]"),)),
    ]


def test_the_pairs_of_one_image_come_together_wherever_they_stand(tmp_path: Path) -> None:
    lines = [{"image": f"{name}.jpg", "Prompt": f"{i}?", "Label": str(i)} for i, name in enumerate("abacab")]
    found = read(tmp_path, *lines[:2], {**OURS, "image": "o.jpg"}, *lines[2:], {**lines[0], "image": "./a.jpg"})
    answers = {candidate.image: [turn.answer for turn in candidate.turns] for candidate in found.candidates}
    assert answers == {"o.jpg": [], "a.jpg": ["0", "2", "4", "0"], "b.jpg": ["1", "5"], "c.jpg": ["3"]}
    assert found.candidates[1].source == "x.jsonl:1" and not found.problems


def test_two_images_whose_hashes_are_equal_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class SameHash:
        def __init__(self, data: bytes, digest_size: int) -> None:
            pass

        def digest(self) -> bytes:
            return bytes(8)

    monkeypatch.setattr(rows, "blake2b", SameHash)
    found = read(tmp_path, PAIR, {**PAIR, "image": "b.jpg"}, PAIR)
    assert [(candidate.image, len(candidate.turns)) for candidate in found.candidates] == [("a.jpg", 2), ("b.jpg", 1)]


def test_a_pair_with_a_key_of_its_own_stands_alone(tmp_path: Path) -> None:
    found = read(tmp_path, PAIR, {**PAIR, "key": "second"})
    assert sorted(str(candidate.key) for candidate in found.candidates) == ["None", "second"]


@pytest.mark.parametrize(
    ("label", "reason", "words"),
    [
        ("**狗[[086,540,400,760]]**", "bad_box_text", "no asterisks"),
        ("[86,540,400,760]", "bad_box_text", "expected"),
        ("[[86,540,400,760]]", "bad_box_text", r"write \[\[086,540,400,760\]\]"),
        ("[[086,540,400,760; 1,2,3,4]]", "bad_box_text", r"write \[\[086,540,400,760;001,002,003,004\]\]"),
        ("[[086,540,400,1000]]", "bad_box_text", "from 000 to 999"),
        ("[[0.1,0.2,0.3,0.4]]", "bad_box_text", "thousandths"),
        ("[[086,540,400]]", "bad_box_text", "expected"),
        ("[[x0,y0,x1,y1]]", "bad_box_text", "expected"),
        ("在[[086,540,400,760]]和[ [1,2,3,4] ]", "bad_box_text", "expected"),
        ("(86,540),(400,760)", "bad_box_text", "expected"),
        ("<box>(86,540),(400,760)</box>", "bad_box_text", "expected"),
        ('{"bbox_2d": [86, 540, 400, 760]}', "bad_box_text", "expected"),
        ("[[400,540,086,760]]", "inverted_box", "x0 <= x1"),
        ("", "bad_field", "not empty"),
        (7, "bad_field", "a string"),
    ],
)
def test_box_text_that_the_official_parser_refuses(tmp_path: Path, label: Any, reason: str, words: str) -> None:
    found = read(tmp_path, {**PAIR, "Label": label}, PAIR)
    assert found.reasons == [("turn", reason)]
    assert found.problems[0].source == "x.jsonl:1"
    assert re.search(words, found.problems[0].detail)
    assert [turn.answer for turn in found.turns] == [PAIR["Label"]]


def test_a_pair_with_the_same_key_twice_is_a_problem(tmp_path: Path) -> None:
    found = read(tmp_path, {**PAIR, "label": "other"})
    assert found.reasons == [("turn", "bad_field")] and "once" in found.problems[0].detail


@pytest.mark.slow
def test_a_long_label_of_brackets_takes_no_time(tmp_path: Path) -> None:
    found = read(tmp_path, *({**PAIR, "Label": piece * 30_000} for piece in ("[[", "[[1,", "<ref>", "(1", "* [ ")))
    assert len(found.turns) + len(found.problems) == 5 and ("turn", "bad_box_text") in found.reasons


def test_our_lines_stream_and_keep_their_own_form(tmp_path: Path) -> None:
    line = {**OURS, "turns": [{"prompt": "p", "answer": "q"}], "Prompt": "not this", "Label": "nor this"}
    found = read(tmp_path, line, line)
    assert len(found.candidates) == 2 and found.turns == [Turn("p", "q")] * 2
    path = write_lines(tmp_path / "x.jsonl", [OURS, b"{"])
    assert isinstance(next(read_jsonl(path, tmp_path)), Candidate)


def test_a_turn_of_ours_may_have_a_history(tmp_path: Path) -> None:
    turn = {"prompt": "p", "answer": "q", "history": [["a", "b"], ["c", "d"]]}
    bad = [{**turn, "history": history} for history in ("x", ["x"], [["a"]], [["a", 7]], [["a", " "]])]
    found = read(tmp_path, {**OURS, "turns": [turn, *bad]})
    assert found.turns == [Turn("p", "q", history=(("a", "b"), ("c", "d")))]
    assert found.reasons == [("turn", "bad_field")] * 5


def test_memory_stays_flat(tmp_path: Path) -> None:
    """Bad lines are counted and not kept, the places of pairs are: 24 bytes each."""

    def peak(num_lines: int) -> int:
        path = write_lines(tmp_path / "x.jsonl", [b'{"image": 7, "key": "%d"}' % i for i in range(num_lines)] + [OURS])
        tracemalloc.start()
        assert sum(1 for _ in read_jsonl(path, tmp_path)) == num_lines + 1
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)
    assert peak(4000) < peak(400) + 20_000


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a":' * 500 + b"1" + b"}" * 500, "bad_field"),
        (b'{"image": ' + b"[" * 500 + b"]" * 500 + b"}", "bad_field"),
        (b'{"image": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "bad_json"),
        (b'{"image": "a\\udcff.jpg", "Prompt": "p", "Label": "q"}', "not_utf8"),
        (b'{"Prompt": "p", "Label": "q"}', "bad_field"),
        (b"\0" * 50, "bad_json"),
    ],
)
def test_bad_lines(tmp_path: Path, line: bytes, reason: str) -> None:
    found = read(tmp_path, line, PAIR)
    assert found.reasons == [("sample", reason)] and len(found.turns) == 1


def test_a_line_without_end_is_left_out_and_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 200)
    found = read(tmp_path, {**PAIR, "Prompt": "x" * 1000}, PAIR, {**PAIR, "Prompt": "x" * 1000})
    assert found.reasons == [("sample", "too_long")] * 2 and len(found.turns) == 1
    assert [problem.source for problem in found.problems] == ["x.jsonl:1", "x.jsonl:3"]


def test_a_file_that_changes_meanwhile_is_a_data_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [OURS, PAIR])
    found = read_jsonl(path, tmp_path)
    next(found)
    write_lines(path, [{**OURS, "image": "other.jpg" * 9}, PAIR])
    with pytest.raises(DataError, match="changed while it was read"):
        list(found)


def test_a_file_without_a_usable_line_says_what_it_wanted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of its 1 lines can be used; expected one JSON object.*first"):
        read(tmp_path, {"file_name": "a.jpg"})


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        (OURS, 'JSON lines with "image" and "targets" or "turns"'),
        (PAIR, 'JSON lines with "Prompt" and "Label"'),
        ({"image": "a.jpg"}, None),
        (b"<xml/>", None),
    ],
)
def test_recognise(tmp_path: Path, line: Any, seen: str | None) -> None:
    assert recognise_jsonl(write_lines(tmp_path / "x.jsonl", [b"", line])) == seen
    assert recognise_jsonl(tmp_path) is None


ARRAY = [{**OURS, "image": f"{name}.jpg"} for name in "abc"]


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_an_array_of_our_lines(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(ARRAY, indent=indent), encoding="utf-8")
    found = read_all(read_jsonl, path)
    assert [candidate.image for candidate in found.candidates] == ["a.jpg", "b.jpg", "c.jpg"] and not found.problems
    assert recognise_jsonl(path)


@pytest.mark.parametrize("end", [",]", "", "}"])
@pytest.mark.parametrize("between", [",", ",\n"])
def test_an_array_that_is_damaged_is_refused(tmp_path: Path, between: str, end: str) -> None:
    path = tmp_path / "x.json"
    path.write_text("[\n" + between.join(map(json.dumps, ARRAY)) + end, encoding="utf-8")
    with pytest.raises(DataError, match=r"x\.json is not valid JSON: .*; expected one JSON array, or one JSON object"):
        read_all(read_jsonl, path)


@pytest.mark.parametrize("between", ["", "\n", "\r\n\r\n"])
@pytest.mark.parametrize("count", [1, 3])
def test_objects_over_several_lines(tmp_path: Path, between: str, count: int) -> None:
    objects = [json.dumps(OURS | {"image": f"{i}.jpg"}, indent=2) for i in range(count)]
    (tmp_path / "x.json").write_text(between.join(objects))
    assert recognise_jsonl(tmp_path / "x.json")
    found = read_all(read_jsonl, tmp_path / "x.json")
    assert list(found.boxes) == [f"{i}.jpg" for i in range(count)] and not found.problems
    (tmp_path / "x.json").write_text(between.join(objects) + between + "{")
    with pytest.raises(DataError, match="not valid JSON"):
        read_all(read_jsonl, tmp_path / "x.json")


def test_fields_of_the_whole_photo_count_too(tmp_path: Path) -> None:
    """Some programs state form and size once per photo."""
    found = read(
        tmp_path,
        OURS | {"format": "jpeg", "mode": "RGB", "width": 640, "height": "480"},  # about the photo
        OURS | {"image": "b.jpg", "bbox_format": "xywh"},
        OURS | {"image": "c.jpg", "units": "percent"},
        OURS | {"image": "d.jpg", "box_format": "XYXY"},
    )
    assert {part.image: part.stated_size_px for part in found.candidates} == {"a.jpg": (640, 480), "d.jpg": None}
    assert found.reasons == [("sample", "bad_field")] * 2 and "xywh" in found.problems[0].detail
