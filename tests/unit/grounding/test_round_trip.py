"""Random phrases and boxes through every wording: what is written reads back as the same boxes, or is refused."""

from __future__ import annotations

import random

import pytest

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.boxes import bins_from_box, parse_boxes
from cogvlm_ft.grounding.targets import Box, Target, Turn
from cogvlm_ft.grounding.turns import build_turns
from cogvlm_ft.grounding.wording import Wording, load_wording

BUILT_IN = ("box", "description", "referring", "detection", "region", "steps", "conversation", "mixed")
NOT_FOUND = {"zh": "未找到指定目标", "en": "The specified target was not found."}
PIECES = (
    *("dog", "一只狗", "猫", " ", "\n", "\r\n", "[", "]", "[[", "]]", "{", "}", "{{", "{boxes}", "{phrase}", "{lines}"),
    *(",", ";", "、", "001", "[[001,002,003,004]]", "[[1,2", "\\1", "%s", "\u200b", "🐕", "未找到指定目标", "：", '"'),
)


def random_text(rng: random.Random) -> str:
    return "".join(rng.choices(PIECES, k=rng.randint(1, 4)))


def random_box(rng: random.Random, size: tuple[int, int]) -> Box:
    """Anywhere in the picture, its borders and fractions of a pixel included."""
    xs, ys = (
        sorted(rng.choice((0.0, side, side - 1, rng.uniform(0, side), rng.randint(0, side))) for _ in "ab")
        for side in size
    )
    return xs[0], ys[0], xs[1], ys[1]


def random_target(rng: random.Random, size: tuple[int, int], text: str) -> Target:
    num_boxes = rng.choice((0, 1, 1, 2, 5, 60))
    boxes = tuple(random_box(rng, size) for _ in range(num_boxes))
    return Target(text, rng.choice(("zh", "en")), boxes, rng.choice((None, text + "!")))


def random_size(rng: random.Random) -> tuple[int, int]:
    return rng.choice(((1, 1), (640, 480), (1000, 1000), (rng.randint(1, 5000), rng.randint(1, 5000))))


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
def test_plain_phrases_read_back(name: str) -> None:
    rng, wording = random.Random(name), load_wording(name)
    for i in range(60):
        size = random_size(rng)
        targets = [random_target(rng, size, f"{rng.choice(('dog', '狗', 'a [red] cat'))} {j}") for j in range(i % 12)]
        turns = build_turns(targets, size, wording, seed=i, epoch=0, key="k")
        assert bool(turns) == any(target.boxes_xyxy or name != "region" for target in targets)
        for turn in turns:
            check(turn, size, wording)


@pytest.mark.parametrize("name", BUILT_IN)
def test_wild_phrases_read_back_or_are_refused(name: str) -> None:
    rng, wording = random.Random(name), load_wording(name)
    num_refused = 0
    for i in range(300):
        size = random_size(rng)
        targets = [random_target(rng, size, random_text(rng)) for _ in range(rng.randint(1, 3))]
        try:
            turns = build_turns(targets, size, wording, seed=i, epoch=0, key="k")
        except DataError as error:
            num_refused += 1
            assert "sample k: the text" in str(error)
            assert any("[" in target.phrase or "]" in target.phrase for target in targets)
        else:
            for turn in turns:
                if turn.scored:
                    check(turn, size, wording)
    if name in ("box", "referring", "detection"):  # their texts hold nothing of the phrase
        assert num_refused == 0
    elif name in ("description", "steps"):
        assert 0 < num_refused < 250
