"""Tiles of a photo, and how their answers are merged."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvlm_ft.grounding.confidence import KeptBoxes
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.grounding.tile_answers import TileAnswer, merge_answers
from cogvlm_ft.grounding.tiles import Window, clip_to_window, tile_windows, visible_fractions

PHOTO = (1000, 500)
PATCH_PX = (14.0, 14.0)

sizes = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


@given(sizes, st.integers(16, 1500), st.floats(0, 0.9), st.data())
def test_tiles_cover_the_photo_and_show_small_targets_whole(
    size_px: tuple[int, int], side_px: int, overlap: float, data: st.DataObject
) -> None:
    windows = tile_windows(size_px, side_px, overlap)
    assert len(set(windows)) == len(windows)
    corners = np.array(windows)
    assert (corners[:, 2:] - corners[:, :2] == [min(side_px, length) for length in size_px]).all()
    assert (corners[:, :2] >= 0).all() and (corners[:, 2:] <= size_px).all()
    longest = max(1, math.floor(side_px * overlap))
    box: list[float] = []
    for length in size_px:
        low = data.draw(st.integers(0, length - 1))
        box.insert(len(box) // 2, low)
        box.append(min(length, low + longest))
    target = (box[0], box[1], min(size_px[0], box[0] + longest), min(size_px[1], box[1] + longest))
    pixel = (box[0], box[1], box[0] + 1, box[1] + 1)
    assert visible_fractions([target], windows).max() == pytest.approx(1)
    assert visible_fractions([pixel], windows).max() == 1


def test_what_is_visible_of_a_box_and_its_part_inside() -> None:
    windows: list[Window] = [(0, 0, 100, 100), (80, 0, 180, 100)]
    assert visible_fractions([(50, 0, 150, 10), (0, 0, 10, 10)], windows).tolist() == [[0.5, 1.0], [0.7, 0.0]]
    assert clip_to_window((50, 0, 150, 10), windows[1]) == (80, 0, 150, 10)
    assert visible_fractions(np.zeros((0, 4)), windows).shape == (2, 0)


def answer(window: Window, boxes: list[Box] | None, confidence: float = 0.8, **others: object) -> TileAnswer:
    return TileAnswer(window, boxes, [confidence] * len(boxes or ()), PATCH_PX, **others)  # type: ignore[arg-type]


LEFT, RIGHT, WHOLE = (0, 0, 500, 500), (400, 0, 900, 500), (0, 0, *PHOTO)


def test_a_target_that_two_tiles_show_is_one_box_and_neighbours_stay_two() -> None:
    merged = merge_answers(
        [answer(LEFT, [(420, 50, 460, 90), (462, 50, 498 - 10, 90)]), answer(RIGHT, [(424, 50, 464, 90)], 0.4)], PHOTO
    )
    assert merged.num_duplicates == 1 and len(merged.boxes or ()) == 2
    assert merged.boxes is not None
    assert merged.boxes[0] == pytest.approx((420 + 4 / 3, 50, 460 + 4 / 3, 90)), "weighted by confidence"
    assert merged.confidences == [0.8, 0.8]


def test_a_cut_box_gives_way_to_the_complete_one_and_parts_become_one() -> None:
    complete, part = (430.0, 100.0, 560.0, 160.0), (430.0, 100.0, 500.0, 160.0)
    merged = merge_answers([answer(LEFT, [part], 0.9), answer(RIGHT, [complete], 0.3)], PHOTO)
    assert merged.boxes == [complete] and merged.num_duplicates == 1
    parts = [answer(LEFT, [(100, 100, 500, 160)]), answer(RIGHT, [(400, 100, 700, 160)])]
    assert merge_answers(parts, PHOTO).boxes == [(100, 100, 700, 160)]


def test_the_whole_photo_adds_large_targets_and_gives_way_for_those_barely_seen() -> None:
    coarse, fine, large = (225.0, 100.0, 243.0, 120.0), (210.0, 105.0, 222.0, 115.0), (100.0, 50.0, 850.0, 450.0)
    answers = [answer(WHOLE, [coarse, large], 0.9), answer(LEFT, [fine], 0.5), answer(RIGHT, [], not_found=True)]
    merged = merge_answers(answers, PHOTO)
    assert merged.boxes == [fine, large] or merged.boxes == [large, fine]
    assert merged.num_duplicates == 1 and not merged.not_found


def test_each_barely_seen_box_gives_way_to_its_own_box_of_a_tile() -> None:
    """Both are within a patch of both; the one that no tile shows stays, whatever its confidence."""
    first, second, third = (100.0, 100.0, 110.0, 110.0), (114.0, 100.0, 124.0, 110.0), (124.0, 112.0, 132.0, 122.0)
    tile = TileAnswer(LEFT, [first, second], [0.9, 0.8], PATCH_PX)
    whole = TileAnswer(WHOLE, [second, third, first], [0.7, 0.6, 0.5], (28.0, 14.0))
    merged = merge_answers([whole, tile], PHOTO)
    assert merged.boxes == [first, second, third] and merged.num_duplicates == 2
    shifted = [(x0 + 3, y0, x1 + 3, y1) for x0, y0, x1, y1 in (second, first)]
    merged = merge_answers([TileAnswer(WHOLE, shifted, [0.7, 0.6], (28.0, 14.0)), tile], PHOTO)
    assert merged.boxes == [first, second], "seen apart, they are two"


def test_rounding_errors_decide_no_order() -> None:
    """Tiles of equal content, such as sky, come in their own order, whatever else was in their batches."""
    boxes, noise = ((10.0, 10.0, 40.0, 40.0), (510.0, 10.0, 540.0, 40.0)), 1e-8
    for confidences in ((0.7, 0.7), (0.7, 0.7 + noise), (0.7 + noise, 0.7)):
        given = zip(((0, 0, 400, 500), (500, 0, 900, 500)), boxes, confidences, strict=True)
        merged = merge_answers([answer(window, [box], confidence) for window, box, confidence in given], PHOTO)
        assert merged.boxes == list(boxes) and merged.best == 0


def test_many_boxes_are_merged_in_time_for_each_of_them() -> None:
    """One box of each of a thousand tiles; comparing each pair on its own took a minute."""
    places = [(40.0 * (i % 40), 40.0 * (i // 40)) for i in range(1000)]
    answers = [answer((int(x), int(y), int(x) + 40, int(y) + 40), [(x + 8, y + 8, x + 25, y + 25)]) for x, y in places]
    assert len(merge_answers(answers, (1600, 1000)).boxes or ()) == 1000


def test_not_found_only_if_every_answer_says_so() -> None:
    says_so = answer(LEFT, [], not_found=True, not_found_prob=0.9)
    unreadable = answer(RIGHT, None, not_found_prob=0.2)
    assert merge_answers([says_so, says_so], PHOTO).not_found
    merged = merge_answers([says_so, unreadable], PHOTO)
    assert (merged.not_found, merged.boxes, merged.not_found_prob, merged.best) == (False, None, 0.2, 1)


def test_a_box_counts_as_much_as_its_answer_is_not_not_found_and_weak_ones_are_removed() -> None:
    """The doubtful tile is as sure of its digits as the other one."""
    right, wrong = (100.0, 100.0, 140.0, 140.0), (600.0, 100.0, 640.0, 140.0)
    says_so = answer((400, 400, 900, 900), [], not_found=True, not_found_prob=0.9)
    answers = [
        answer(RIGHT, [wrong], 0.9, not_found_prob=0.5),
        answer(LEFT, [right], 0.8, not_found_prob=0.1),
        says_so,
    ]
    merged = merge_answers(answers, PHOTO)
    assert merged.boxes == [right, wrong] and merged.confidences == pytest.approx([0.72, 0.45])
    assert (merged.removed, merged.best) == ([], 1)
    merged = merge_answers(answers, PHOTO, KeptBoxes(0.5))
    assert (merged.boxes, merged.removed, merged.not_found) == ([right], [(wrong, pytest.approx(0.45))], False)
    merged = merge_answers(answers, PHOTO, KeptBoxes(0.8))
    assert (merged.boxes, len(merged.removed), merged.not_found, merged.best) == ([], 2, True, 2)
    merged = merge_answers(answers, PHOTO, KeptBoxes(only_best=True))
    assert (merged.boxes, len(merged.removed), merged.confidences) == ([right], 1, pytest.approx([0.72]))
    merged = merge_answers([*answers, answer(RIGHT, None)], PHOTO, KeptBoxes(0.8))
    assert (merged.boxes, merged.not_found, merged.best) == (None, False, 3), "one answer is not known"
