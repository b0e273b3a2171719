"""Decisions of a review: which files are taken, and what they do to candidates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Target, Turn
from cogvlm_ft.shards.packing.candidates import Candidate, Problem
from cogvlm_ft.shards.packing.decisions import Decisions, load_decisions, part_ids

DOG = Target("dog", "en", ((1.0, 2.0, 30.0, 40.0), (5.0, 5.0, 9.0, 9.0)))
CAT = Target("cat", "en", ((0.0, 0.0, 8.0, 8.0),), "a cat")
EARLIER = Problem("box", "not_numeric", "earlier", "a:1")


def candidate(**changes: Any) -> Candidate:
    fields: dict[str, Any] = {"targets": (DOG, CAT), "turns": (Turn("Where?", "Here."),), "problems": (EARLIER,)}
    return Candidate("photos/a.jpg", None, "lines.jsonl:1", **{**fields, **changes})


def decide(tmp_path: Path, *rows: dict[str, Any]) -> Decisions:
    path = tmp_path / "review_decisions.json"
    path.write_text(json.dumps({"decisions": rows}))
    return load_decisions(path)


def test_nothing_decided_changes_nothing(tmp_path: Path) -> None:
    assert decide(tmp_path).apply(candidate()) == (candidate(), [])


def test_ids_depend_on_the_part_and_not_on_its_place() -> None:
    ids = part_ids(candidate())
    every = [ids.sample, *ids.targets, *ids.turns, *(part for boxes in ids.boxes for part in boxes)]
    assert len(set(every)) == len(every) == 7
    moved = part_ids(candidate(targets=(CAT, DOG)))
    assert moved.sample == ids.sample
    assert (moved.targets, moved.boxes) == (ids.targets[::-1], ids.boxes[::-1])
    assert part_ids(Candidate("photos/b.jpg", None, "", (DOG,))).boxes != ids.boxes[:1]


def test_equal_parts_have_ids_of_their_own() -> None:
    twice = part_ids(candidate(targets=(Target("dog", "en", (DOG.boxes_xyxy[0],) * 2),)))
    assert len(set(twice.boxes[0])) == 2


def test_accept_keeps_a_part(tmp_path: Path) -> None:
    decisions = decide(
        tmp_path, {"id": part_ids(candidate()).boxes[0][0], "decision": "accept", "image": "a", "note": ""}
    )
    assert decisions.apply(candidate()) == (candidate(), [])
    assert decisions.unmet() == []


def test_a_dropped_box_becomes_a_problem(tmp_path: Path) -> None:
    part = part_ids(candidate()).boxes[0][1]
    kept, lost = decide(tmp_path, {"id": f"{part}.under_one_patch", "decision": "drop"}).apply(candidate())
    assert kept is not None and lost == []
    assert [target.boxes_xyxy for target in kept.targets] == [DOG.boxes_xyxy[:1], CAT.boxes_xyxy]
    assert [problem.reason for problem in kept.problems] == ["not_numeric", "dropped_by_review"]
    assert "review_decisions.json decisions[0]" in kept.problems[1].detail


def test_a_target_without_its_last_box_is_not_absent(tmp_path: Path) -> None:
    kept, _ = decide(tmp_path, {"id": part_ids(candidate()).boxes[1][0], "decision": "drop"}).apply(candidate())
    assert kept is not None
    assert kept.targets == (DOG,)
    assert [problem.reason for problem in kept.problems[1:]] == ["dropped_by_review", "no_boxes_left"]


@pytest.mark.parametrize("what", ["target", "turn"])
def test_a_dropped_target_or_turn(tmp_path: Path, what: str) -> None:
    ids = part_ids(candidate())
    part = {"target": ids.targets[0], "turn": ids.turns[0]}[what]
    kept, _ = decide(tmp_path, {"id": part, "decision": "drop"}).apply(candidate())
    assert kept is not None
    assert kept.targets == ((CAT,) if what == "target" else (DOG, CAT))
    assert len(kept.turns) == (1 if what == "target" else 0)
    assert (kept.problems[1].level, kept.problems[1].reason) == (what, "dropped_by_review")


def test_a_dropped_sample_takes_its_problems_with_it(tmp_path: Path) -> None:
    kept, lost = decide(tmp_path, {"id": part_ids(candidate()).sample, "decision": "drop"}).apply(candidate())
    assert kept is None
    assert [(problem.level, problem.reason) for problem in lost] == [
        ("box", "not_numeric"),
        ("sample", "dropped_by_review"),
    ]


def test_nothing_left_is_a_lost_sample(tmp_path: Path) -> None:
    only_dog = candidate(targets=(DOG,), turns=())
    kept, lost = decide(tmp_path, {"id": part_ids(only_dog).targets[0], "decision": "drop"}).apply(only_dog)
    assert kept is None
    assert [problem.reason for problem in lost] == ["not_numeric", "dropped_by_review", "no_targets_left"]


def test_edits(tmp_path: Path) -> None:
    ids = part_ids(candidate())
    decisions = decide(
        tmp_path,
        {"id": ids.boxes[0][0], "decision": "edit", "boxes": [[0, 0, 3, 3], [4, 4, 6, 6]]},
        {"id": ids.targets[1], "decision": "edit", "phrase": " 黑猫 ", "boxes": [], "description": None},
        {"id": ids.turns[0], "decision": "edit", "answer": "There."},
    )
    kept, lost = decisions.apply(candidate())
    assert kept is not None and lost == []
    assert kept.targets[0].boxes_xyxy == ((0.0, 0.0, 3.0, 3.0), (4.0, 4.0, 6.0, 6.0), (5.0, 5.0, 9.0, 9.0))
    assert kept.targets[1] == Target("黑猫", "zh", ())
    assert kept.turns == (Turn("Where?", "There."),)
    assert kept.problems == (EARLIER,)
    assert decisions.unmet() == []


def test_decisions_that_fit_nothing_are_reported(tmp_path: Path) -> None:
    ids = part_ids(candidate())
    rows = [
        {"id": "box-0123456789abcdef", "decision": "drop"},
        {"id": ids.targets[0], "decision": "drop"},
        {"id": ids.boxes[0][0], "decision": "drop"},
    ]
    decisions = decide(tmp_path, *rows)
    decisions.apply(candidate())
    unmet = decisions.unmet()
    assert [(problem.level, problem.reason) for problem in unmet] == [("box", "decision_fits_nothing")] * 2
    assert [problem.source for problem in unmet] == [
        "review_decisions.json decisions[0]",
        "review_decisions.json decisions[2]",
    ]


def test_csv(tmp_path: Path) -> None:
    ids = part_ids(candidate())
    path = tmp_path / "decisions.csv"
    lines = ["id,decision,boxes,phrase,note"]
    lines += [
        f'{ids.boxes[0][0]},edit,"[[0,0,3,3]]",,moved',
        f"{ids.targets[1]},edit,,lion,",
        f"{ids.turns[0]},drop,,,",
    ]
    path.write_text("\n".join(lines), encoding="utf-8-sig")
    decisions = load_decisions(path)
    kept, _ = decisions.apply(candidate())
    assert kept is not None
    assert kept.targets[0].boxes_xyxy[0] == (0.0, 0.0, 3.0, 3.0)
    assert kept.targets[1].phrase == "lion"
    assert kept.turns == ()
    assert len(decisions) == 3


BOX = "box-0123456789abcdef"
TARGET = "target-0123456789abcdef"


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[" * 100_000,
        b"\xff\xfe",
        b"7",
        b'{"decisions": {}}',
        b'["drop"]',
        json.dumps([{"id": "12", "decision": "drop"}]).encode(),
        json.dumps([{"id": BOX, "decision": "delete"}]).encode(),
        json.dumps([{"id": BOX, "decision": ["drop"]}]).encode(),
        json.dumps([{"id": "box-../../etc/passwd", "decision": "drop"}]).encode(),
        json.dumps([{"id": BOX, "decision": "edit"}]).encode(),
        json.dumps([{"id": BOX, "decision": "drop", "boxes": [[1, 2, 3, 4]]}]).encode(),
        json.dumps([{"id": BOX, "decision": "edit", "boxes": []}]).encode(),
        json.dumps([{"id": BOX, "decision": "edit", "boxes": [[1, 2, 3]]}]).encode(),
        json.dumps([{"id": BOX, "decision": "edit", "boxes": [[5, 2, 3, 4]]}]).encode(),
        json.dumps([{"id": BOX, "decision": "edit", "phrase": "x"}]).encode(),
        json.dumps([{"id": TARGET, "decision": "edit", "phrase": " "}]).encode(),
        json.dumps([{"id": TARGET, "decision": "edit", "phrase": "\ud800"}]).encode(),
        json.dumps([{"id": TARGET, "decision": "edit", "language": "fr"}]).encode(),
        json.dumps([{"id": "sample-0123456789abcdef", "decision": "edit", "phrase": "x"}]).encode(),
        json.dumps([{"id": BOX, "decision": "drop"}, {"id": BOX, "decision": "accept"}]).encode(),
    ],
)
def test_bad_files_are_refused_with_the_row(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"mine\.json"):
        load_decisions(path)


@pytest.mark.parametrize("row", ["a,b,c,d", f"{BOX},edit,notjson", f"{BOX},drop,,more"])
def test_bad_csv_is_refused_with_the_line(tmp_path: Path, row: str) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(f"id,decision,boxes\n{row}\n")
    with pytest.raises(DataError, match=r"mine\.csv:2"):
        load_decisions(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json"):
        load_decisions(tmp_path / "none.json")
