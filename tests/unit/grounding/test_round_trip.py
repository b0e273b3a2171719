"""Random phrases and boxes through every wording: the text parses back to the same boxes, or is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import boxes_in

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.boxes import bins_from_box, parse_boxes
from cogvlm_ft.grounding.targets import Target, Turn
from cogvlm_ft.grounding.turns import build_turns
from cogvlm_ft.grounding.wording import Wording, load_wording

BUILT_IN = ("box", "description", "referring", "detection", "region", "steps", "conversation", "mixed")
WORDINGS = {name: load_wording(name) for name in BUILT_IN}
NOT_FOUND = {"zh": "未找到指定目标", "en": "The specified target was not found."}
PIECES = (
    *("dog", "一只狗", "猫", " ", "\n", "\r\n", "[", "]", "[[", "]]", "{", "}", "{{", "{boxes}", "{phrase}", "{lines}"),
    *(",", ";", "、", "001", "[[001,002,003,004]]", "[[1,2", "\\1", "%s", "\u200b", "🐕", "未找到指定目标", "：", '"'),
)


SIZES = st.sampled_from([(1, 1), (640, 480), (1000, 1000)]) | st.tuples(st.integers(1, 5000), st.integers(1, 5000))
PLAIN = st.tuples(st.sampled_from(["dog", "狗", "a [red] cat"]), st.integers(0, 12)).map(
    lambda parts: "{} {}".format(*parts)
)
WILD = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join)


@st.composite
def photos(draw: st.DrawFn, phrases: st.SearchStrategy[str]) -> tuple[tuple[int, int], list[Target]]:
    """A size and up to seven targets, some of them absent and some with more boxes than an answer lists."""
    size = draw(SIZES)
    targets = []
    for _ in range(draw(st.integers(0, 7))):
        phrase, num_boxes = draw(phrases), draw(st.sampled_from((0, 1, 1, 2, 5)))
        boxes = tuple(draw(boxes_in(size)) for _ in range(num_boxes)) * draw(st.sampled_from((1, 1, 1, 12)))
        description = draw(st.sampled_from((None, phrase + "!")))
        targets.append(Target(phrase, draw(st.sampled_from(("zh", "en"))), boxes, description))
    return size, targets


def check(turn: Turn, size: tuple[int, int], wording: Wording) -> None:
    """The boxes in the text are true ones, as many as are not cut; without any the answer is the fixed sentence."""
    assert turn.target is not None
    true_bins = [bins_from_box(box, size) for box in turn.target.boxes_xyxy]
    if not true_bins:
        assert turn.answer == NOT_FOUND[turn.target.language]
        assert turn.scored
        return
    if not turn.scored and not parse_boxes(turn.prompt):
        return  # the summary that opens a conversation
    found = parse_boxes(turn.answer if turn.scored else turn.prompt)
    assert found is not None
    assert len(found) == len(true_bins) - turn.num_cut_boxes
    for box in found:
        true_bins.remove(box)
    assert len(found) <= wording.max_boxes


@pytest.mark.parametrize("name", BUILT_IN)
@settings(max_examples=40)
@given(photo=photos(PLAIN), seed=st.integers(0, 99))
def test_plain_phrases_read_back(name: str, photo: tuple[tuple[int, int], list[Target]], seed: int) -> None:
    (size, targets), wording = photo, WORDINGS[name]
    turns = build_turns(targets, size, wording, seed=seed, epoch=0, key="k")
    assert bool(turns) == any(target.boxes_xyxy or name != "region" for target in targets)
    for turn in turns:
        check(turn, size, wording)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT_IN)
@settings(max_examples=60)
@given(photo=photos(WILD), seed=st.integers(0, 99))
def test_wild_phrases_read_back_or_are_refused(
    name: str, photo: tuple[tuple[int, int], list[Target]], seed: int
) -> None:
    (size, targets), wording = photo, WORDINGS[name]
    try:
        turns = build_turns(targets, size, wording, seed=seed, epoch=0, key="k")
    except DataError as error:
        assert "sample k: the text" in str(error)
        assert any("[" in target.phrase or "]" in target.phrase for target in targets)
        assert name not in ("box", "referring", "detection"), "their texts hold nothing of the phrase"
    else:
        for turn in turns:
            if turn.scored:
                check(turn, size, wording)


@pytest.mark.parametrize("name", ["description", "steps"])
def test_brackets_are_refused_only_where_they_would_be_read(name: str) -> None:
    box = ((1.0, 2.0, 30.0, 40.0),)
    for phrase, refused in (("[[1,2", True), ("[[001,002,003,004]]", True), ("a [red] cat", False), ("]]", False)):
        try:
            build_turns([Target(phrase, "en", box)], (640, 480), WORDINGS[name], seed=0, epoch=0, key="k")
            found = False
        except DataError:
            found = True
        assert found == refused, phrase
