"""Questions and answers of each style about the targets of one image."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from strategies import targets_in

from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.grounding.boxes import bins_from_box, parse_boxes
from cogvlm_ft.grounding.metrics import score_answer
from cogvlm_ft.grounding.targets import Box, Target, Turn
from cogvlm_ft.grounding.turns import build_turns, merge_targets, most_turns
from cogvlm_ft.grounding.wording import Wording, load_wording

SIZE = (1000, 1000)
DOG = Target("dog", "en", ((86, 540, 400, 760),), "a brown dog")
CATS = Target("cat", "en", ((500, 500, 600, 600), (0, 0, 100, 100)))
BIRD = Target("bird", "en", ())
GOU, NIAO = Target("狗", "zh", ((1, 2, 3, 4),)), Target("鸟", "zh", ())
NOT_FOUND = ("未找到指定目标", "The specified target was not found.")
PLAIN = {"prompts": ["{phrase}?"], "answers": ["{boxes}"], "not_found": "none"}


def turns_of(targets: list[Target], wording: Wording | str, *, epoch: int = 0, key: str = "k") -> list[Turn]:
    wording = load_wording(wording) if isinstance(wording, str) else wording
    return build_turns(targets, SIZE, wording, seed=0, epoch=epoch, key=key)


def own(folder: Path, **content: Any) -> Wording:
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return load_wording(path)


def row_of_boxes(num: int) -> tuple[Box, ...]:
    """Disjoint, the first one rightmost and smallest."""
    return tuple((900.0 - 10 * i, 0.0, 901.0 - 10 * i + 5 * i / num, 10.0) for i in range(num))


def bins(boxes: tuple[Box, ...] | list[Box]) -> list[tuple[int, int, int, int]]:
    return [bins_from_box(box, SIZE) for box in boxes]


def test_detection_asks_once_for_all_boxes_of_a_class() -> None:
    pieces = [Target("cat", "en", (box,)) for box in CATS.boxes_xyxy]
    turns = turns_of([pieces[0], DOG, pieces[1], BIRD], "detection")
    assert sorted(turn.answer for turn in turns) == [
        NOT_FOUND[1],
        "[[086,540,400,760]]",
        "[[500,500,600,600;000,000,100,100]]",
    ]
    assert len(turns_of([*pieces, DOG], "referring")) == 3


def test_merging_keeps_a_description_only_if_there_is_one() -> None:
    a, b, c = (Target("dog", "en", ((i, i, 9, 9),), text) for i, text in enumerate(["red", None, "blue"]))
    assert merge_targets([a, b]) == [Target("dog", "en", ((0, 0, 9, 9), (1, 1, 9, 9)), "red")]
    assert [target.description for target in merge_targets([a, c, a])] == [None]
    assert len(merge_targets([a, c, a])[0].boxes_xyxy) == 2
    assert merge_targets([a, replace(a, language="zh")])[0] is a


def test_boxes_in_the_question_and_a_description_as_the_answer() -> None:
    turns = turns_of([DOG, BIRD, CATS], "region")
    assert {turn.answer for turn in turns} == {"a brown dog", "cat"}
    for turn in turns:
        assert turn.target is not None
        assert parse_boxes(turn.prompt) == bins(turn.target.boxes_xyxy)
        assert not turn.scored
    assert turns_of([BIRD], "region") == []


def test_a_step_wise_answer_counts_then_gives_a_line_to_each() -> None:
    texts = set()
    for epoch in range(30):
        (turn,) = turns_of([DOG, BIRD, CATS], "steps", epoch=epoch)
        summary, *lines = turn.answer.split("\n")
        texts.add(summary)
        assert sorted(lines) == [
            f"bird: {NOT_FOUND[1]}",
            "cat: [[500,500,600,600;000,000,100,100]]",
            "dog: [[086,540,400,760]]",
        ]
        assert all(target.phrase in turn.prompt for target in (DOG, BIRD, CATS))
        assert turn.target is not None
        assert sorted(turn.target.boxes_xyxy) == sorted(DOG.boxes_xyxy + CATS.boxes_xyxy)
        assert parse_boxes(turn.answer) == bins(turn.target.boxes_xyxy)
        assert score_answer(turn.answer, turn.target.boxes_xyxy, SIZE, NOT_FOUND).iou > 0.9
    assert texts == {"Found 3: dog, cat.", "Found 3: cat, dog."}


def test_a_chinese_step_wise_answer() -> None:
    answers = {turns_of([GOU, NIAO], "steps", epoch=epoch)[0].answer for epoch in range(20)}
    lines = ["狗：[[001,002,003,004]]", "鸟：未找到指定目标"]
    assert answers == {"\n".join(["共找到1处：狗。", *order]) for order in (lines, lines[::-1])}


def test_nothing_of_what_is_asked_is_there() -> None:
    (turn,) = turns_of([BIRD, replace(BIRD, phrase="fish")], "steps")
    assert turn.answer == NOT_FOUND[1]
    assert turn.target is not None and turn.target.boxes_xyxy == ()


@pytest.mark.parametrize("style", ["steps", "conversation"])
def test_two_languages_are_never_in_one_question(style: str) -> None:
    for turn in turns_of([DOG, GOU, CATS, NIAO], style):
        text = turn.prompt + turn.answer
        assert any(word in text for word in ("dog", "cat")) != any(word in text for word in ("狗", "鸟"))


def test_many_targets_are_asked_in_groups(tmp_path: Path) -> None:
    targets = [Target(f"thing{i}", "en", ((i, i, i + 9, i + 9),)) for i in range(7)]
    wording = replace(load_wording("steps"), max_targets=3)
    turns = turns_of(targets, wording)
    assert [len(turn.answer.splitlines()) - 1 for turn in turns] == [3, 3, 1]
    assert Counter(box for turn in turns for box in parse_boxes(turn.answer) or ()) == Counter(
        bins([target.boxes_xyxy[0] for target in targets])
    )
    small = replace(wording, max_boxes=2)
    assert [len(turn.answer.splitlines()) - 1 for turn in turns_of(targets, small)] == [2, 2, 2, 1]


def test_an_open_question_is_answered_with_what_is_there(tmp_path: Path) -> None:
    texts = {
        "prompts": ["What is here?"],
        "lines": ["{number} {phrase} {boxes}"],
        "answers": ["{count}: {phrases}\n{lines}"],
    }
    wording = own(tmp_path, style="steps", max_targets=2, en=texts | {"not_found": "none"})
    fish = Target("fish", "en", ((7, 7, 8, 8),))
    for epoch in range(5):
        (turn,) = turns_of([BIRD, CATS, DOG, fish], wording, epoch=epoch)
        assert turn.answer == (
            "4: cat, dog, fish\n1 cat [[500,500,600,600;000,000,100,100]]\n2 dog [[086,540,400,760]]"
            " (4 in all, 3 of them listed)"
        )
        assert turn.num_cut_boxes == 1
    assert [turn.answer for turn in turns_of([BIRD], wording)] == ["none"]


def test_a_conversation_goes_through_the_targets_and_remembers() -> None:
    first, *rest = turns_of([DOG, BIRD, CATS], "conversation")
    assert first.answer in {"Found 3: dog, cat.", "Found 3: cat, dog."}
    assert first.history == () and not first.scored
    assert {turn.answer for turn in rest} == {
        NOT_FOUND[1],
        "[[086,540,400,760]]",
        "[[500,500,600,600;000,000,100,100]]",
    }
    turns = [first, *rest]
    for number, turn in enumerate(turns):
        assert turn.history == tuple((earlier.prompt, earlier.answer) for earlier in turns[:number])
    for turn in rest:
        assert turn.scored and turn.target is not None and turn.target.phrase in turn.prompt


def test_every_conversation_starts_anew() -> None:
    targets = [Target(f"thing{i}", "en", ((i, i, i + 9, i + 9),)) for i in range(5)]
    turns = turns_of(targets, replace(load_wording("conversation"), max_targets=3))
    assert [len(turn.history) for turn in turns] == [0, 1, 2, 3, 0, 1, 2]
    assert Counter(turn.target.phrase for turn in turns if turn.history and turn.target) == Counter(
        target.phrase for target in targets
    )


def test_a_conversation_about_absent_things_is_scored_from_the_start() -> None:
    turns = turns_of([BIRD], "conversation")
    assert [(turn.answer, turn.scored) for turn in turns] == [(NOT_FOUND[1], True)] * 2


def test_a_mix_uses_every_part_as_often_as_its_weight_says(tmp_path: Path) -> None:
    parts = [PLAIN | {"answers": [f"{name} {{boxes}}"]} for name in "ab"]
    wording = own(tmp_path, mix=[{"en": parts[0]}, {"wording": {"en": parts[1]}, "weight": 3}])
    found = Counter(turns_of([DOG], wording, key=str(i))[0].answer[0] for i in range(400))
    assert 60 < found["a"] < 140
    assert turns_of([DOG], wording, key="7") == turns_of([DOG], wording, key="7")


def test_one_picture_is_asked_in_one_style_and_describes_only_what_is_there() -> None:
    mixed = load_wording("mixed")
    for i in range(200):
        turns = turns_of([BIRD], mixed, key=str(i))
        assert turns and {turn.answer for turn in turns} == {NOT_FOUND[1]}
        turns = turns_of([DOG, CATS], mixed, key=str(i))
        assert len({turn.answer.startswith("Found") for turn in turns if not turn.history}) == 1


def test_the_sentence_for_absent_things_is_named_in_the_question(tmp_path: Path) -> None:
    wording = own(
        tmp_path, en=PLAIN | {"prompts": ["{phrase}? Else say: {not_found}"], "not_found": "I see no such thing"}
    )
    (turn,) = turns_of([BIRD], wording)
    assert (turn.prompt, turn.answer) == ("bird? Else say: I see no such thing", "I see no such thing")


def test_a_business_form_with_braces(tmp_path: Path) -> None:
    answer = '{{"label": "{phrase}", "boxes": {boxes}, "note": "{more}"}}'
    wording = own(tmp_path, en=PLAIN | {"answers": [answer]}, max_boxes=1)
    assert turns_of([DOG], wording)[0].answer == '{"label": "dog", "boxes": [[086,540,400,760]], "note": ""}'
    assert turns_of([CATS], wording)[0].answer == (
        '{"label": "cat", "boxes": [[500,500,600,600]], "note": " (2 in all, 1 of them listed)"}'
    )


@pytest.mark.parametrize(("order", "first", "last"), [("file", 0, 2), ("left_to_right", 9, 7), ("large_first", 9, 7)])
def test_a_long_list_is_cut_in_the_order_of_the_wording_and_says_so(
    tmp_path: Path, order: str, first: int, last: int
) -> None:
    boxes = row_of_boxes(10)
    wording = own(tmp_path, en=PLAIN, max_boxes=3, box_order=order)
    (turn,) = turns_of([Target("nail", "en", boxes)], wording)
    shown = parse_boxes(turn.answer)
    assert shown is not None and len(shown) == 3
    assert (shown[0], shown[-1]) == (bins_from_box(boxes[first], SIZE), bins_from_box(boxes[last], SIZE))
    assert turn.answer.endswith("]] (10 in all, 3 of them listed)")
    assert turn.num_cut_boxes == 7


def test_the_note_in_chinese_and_in_own_words(tmp_path: Path) -> None:
    nails = Target("钉子", "zh", row_of_boxes(51))
    (turn,) = turns_of([nails], "box")
    assert turn.answer.endswith("]]（共51处，只列出50处）")
    wording = own(tmp_path, zh=PLAIN | {"more": "，还有更多", "answers": ["{more}{count}个：{boxes}"]})
    (turn,) = turns_of([nails], wording)
    assert turn.answer.startswith("，还有更多51个：[[") and turn.answer.endswith("]]")
    assert turns_of([replace(nails, boxes_xyxy=nails.boxes_xyxy[:50])], "box")[0].num_cut_boxes == 0


def test_the_score_does_not_punish_the_cut(tmp_path: Path) -> None:
    """Any three of the ten are a whole answer, two are not, and all ten are one too."""
    wording = own(tmp_path, en=PLAIN, max_boxes=3)
    boxes = tuple((100.0 * i, 0.0, 100.0 * i + 90, 900.0) for i in range(10))
    (turn,) = turns_of([Target("plank", "en", boxes)], wording)
    assert turn.target is not None

    def iou(num: int) -> float:
        (answer,) = turns_of([Target("plank", "en", boxes[::-1][:num])], replace(wording, max_boxes=num))
        return score_answer(answer.answer, boxes, SIZE, (), num_cut_boxes=turn.num_cut_boxes).iou

    assert score_answer(turn.answer, boxes, SIZE, (), num_cut_boxes=turn.num_cut_boxes).iou > 0.95
    assert iou(3) > 0.95 and iou(10) > 0.95
    assert iou(2) == pytest.approx(2 / 3, abs=0.03)


@pytest.mark.parametrize("style", ["steps", "conversation"])
def test_the_longest_list_of_many_is_cut_first(style: str) -> None:
    nails = Target("nail", "en", row_of_boxes(40))
    wording = replace(load_wording(style), max_boxes=10)
    turns = turns_of([DOG, nails, CATS, BIRD], wording)
    text = "\n".join(turn.answer for turn in turns)
    assert len(parse_boxes(text) or ()) == 10
    assert sum(turn.num_cut_boxes for turn in turns) == 33
    listed = "(43 in all, 10 of them listed)" if style == "steps" else "(40 in all, 7 of them listed)"
    assert listed in text


WORDINGS = [load_wording(name) for name in ("box", "detection", "region", "steps", "conversation", "mixed")]


@given(
    st.lists(targets_in(SIZE), max_size=9),
    st.sampled_from(WORDINGS),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 99),
)
def test_never_more_turns_than_stated(
    targets: list[Target], wording: Wording, max_targets: int, max_boxes: int, epoch: int
) -> None:
    limits = {"max_targets": max_targets, "max_boxes": max_boxes}
    wording = replace(wording, **limits, mix=tuple(replace(part, **limits) for part in wording.mix))
    assert len(turns_of(targets, wording, epoch=epoch)) <= most_turns(len(targets), wording)


@pytest.mark.parametrize("wording", WORDINGS, ids=lambda wording: wording.name)
@pytest.mark.parametrize("num_targets", range(13))
def test_there_may_be_as_many_turns_as_stated(num_targets: int, wording: Wording) -> None:
    """Different targets, all present, one of them in the other language."""
    names = ["狗", *(f"dog {i}" for i in range(num_targets - 1))][:num_targets]
    targets = [Target(name, "zh" if name == "狗" else "en", DOG.boxes_xyxy) for name in names]
    found = [len(turns_of(targets, wording, epoch=epoch)) for epoch in range(20 if wording.mix else 1)]
    assert max(found) == most_turns(num_targets, wording)


def test_a_language_that_is_missing_is_named_in_every_style(tmp_path: Path) -> None:
    for style in ("referring", "detection", "region", "steps", "conversation"):
        wording = load_wording(style)
        english = replace(wording, languages={"en": wording.languages["en"]})
        with pytest.raises(ConfigError, match=rf"{style} has en, but sample k has a target in 'zh' \('狗'\)"):
            turns_of([GOU], english)


def test_box_text_in_a_phrase_is_refused_where_it_would_be_read() -> None:
    trap = replace(DOG, phrase="sign [[001,002,003,004]]", description=None)
    for style in ("description", "steps"):
        with pytest.raises(DataError, match=r"sample k: .* does not read back as the boxes of 'sign"):
            turns_of([trap], style)
    assert turns_of([trap], "referring")[0].answer == "[[086,540,400,760]]"
