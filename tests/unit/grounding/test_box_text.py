from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import boxes_in

from cogvlm_ft.grounding.boxes import (
    Bins,
    bins_from_box,
    boxes_from_bins,
    close_cut_list,
    format_boxes,
    parse_boxes,
)
from cogvlm_ft.grounding.targets import Box


def test_the_example_of_the_published_model() -> None:
    assert format_boxes([(86, 540, 400, 760)], (1000, 1000)) == "[[086,540,400,760]]"


def test_several_boxes_share_one_group_in_the_order_given() -> None:
    assert format_boxes([(50, 50, 99, 99), (0, 0, 10, 10)], (100, 100)) == "[[500,500,990,990;000,000,100,100]]"


def test_a_full_picture_is_clamped_to_its_last_pixel() -> None:
    assert bins_from_box((0, 0, 640, 480), (640, 480)) == (0, 0, 998, 997)
    assert bins_from_box((-5, -5, 9999, 9999), (4000, 3000)) == (0, 0, 999, 999)


@pytest.mark.parametrize(
    ("text", "bins"),
    [
        ("[[086,540,400,760]]", [(86, 540, 400, 760)]),
        ("a dog [[1,2,3,4;5,6,7,8]] and a cat [[009,010,011,012]].", [(1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12)]),
        ("[[900,900,100,100]]", [(900, 900, 100, 100)]),
    ],
)
def test_readable_answers(text: str, bins: list[tuple[int, int, int, int]]) -> None:
    assert parse_boxes(text) == bins


@pytest.mark.parametrize(
    "text",
    [
        "",
        "未找到指定目标",
        "[[]]",
        "[[086,540,400]]",
        "[[086,540,400,760,1]]",
        "[[086, 540, 400, 760]]",
        "[[0.1,0.2,0.3,0.4]]",
        "[[-01,002,003,004]]",
        "[[1000,002,003,004]]",
        "[[001,002,003,004;]]",
        "[[001,002,003,004]] [[x0,y0,x1,y1]]",
        "[086,540,400,760]",
        "[[086,540,400,76",
        "[[086,540,400,76\u0660]]",  # an Arabic digit is a digit to Python, not to the model
        "[[086,540,400,760\n]]",
    ],
)
def test_unreadable_answers(text: str) -> None:
    assert parse_boxes(text) is None


def test_decoding_gives_bin_centres_in_pixels() -> None:
    boxes = boxes_from_bins([(0, 0, 999, 999)], (1000, 2000))
    assert boxes.dtype == np.float64
    np.testing.assert_allclose(boxes, [[0.5, 1.0, 999.5, 1999.0]])
    assert boxes_from_bins([], (10, 10)).shape == (0, 4)


SIZES = st.tuples(st.integers(1, 20000), st.integers(1, 20000))
ITEM = st.tuples(*[st.integers(0, 999)] * 4)


@given(st.data(), SIZES)
def test_a_box_comes_back_within_half_a_bin(data: st.DataObject, size: tuple[int, int]) -> None:
    """Up to the last pixel, where it is clamped."""
    boxes = data.draw(st.lists(boxes_in(size), min_size=1, max_size=5))
    bins = parse_boxes(format_boxes(boxes, size))
    assert bins == [bins_from_box(box, size) for box in boxes]
    sides = np.array(size * 2)
    error = np.abs(boxes_from_bins(bins, size) - np.minimum(boxes, sides - 1))
    assert (error <= sides / 2000 + 1e-6).all()


@given(st.tuples(*[st.floats(-1e9, 1e9)] * 4), SIZES)
def test_whatever_the_box_its_text_is_readable(box: Box, size: tuple[int, int]) -> None:
    """Also outside the image and inverted; a larger coordinate never gets a smaller bin."""
    text = format_boxes([box], size)
    assert re.fullmatch(r"\[\[\d{3}(,\d{3}){3}\]\]", text)
    [(x0, y0, x1, y1)] = parse_boxes(text) or []
    assert (x0 <= x1) >= (box[0] <= box[2]) and (y0 <= y1) >= (box[1] <= box[3])


@given(st.lists(st.lists(ITEM, min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_boxes_are_found_in_any_text_around_them(groups: list[list[Bins]], data: st.DataObject) -> None:
    around = st.text(st.characters(exclude_characters="[]"))
    form = data.draw(st.sampled_from(["03d", "d"]))
    text = data.draw(around)
    for group in groups:
        items = ";".join(",".join(format(number, form) for number in item) for item in group)
        text += f"[[{items}]]{data.draw(around)}"
    assert parse_boxes(text) == [item for group in groups for item in group]


@given(st.text() | st.text("[],;0123456789 ") | st.lists(st.sampled_from(["[[", "]]", "1,2,3,4", ";"])).map("".join))
def test_any_text_is_read_or_refused(text: str) -> None:
    found = parse_boxes(text)
    assert found is None or (found and all(len(item) == 4 and 0 <= min(item) <= max(item) <= 999 for item in found))


@given(ITEM, st.tuples(st.integers(1000, 20000), st.integers(1000, 20000)))
def test_an_answer_written_again_is_the_same_text(item: Bins, size: tuple[int, int]) -> None:
    """With a pixel or more per bin; in a smaller image the last pixel is more than the last bin."""
    text = format_boxes([tuple(box) for box in boxes_from_bins([item], size).tolist()], size)
    last = [(side - 1) * 1000 // side for side in size * 2]
    assert parse_boxes(text) == [tuple(map(min, zip(item, last, strict=True)))]


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("[[001,002,003,004;005,006,007,00", "[[001,002,003,004]]"),
        ("[[001,002,003,004;005,006,007,008", "[[001,002,003,004]]"),  # perhaps complete, perhaps not
        ("[[001,002,003,004;", "[[001,002,003,004]]"),
        ("[[001,002,003,004]", "[[001,002,003,004]]"),
        ("[[001,002,003,004", ""),
        ("狗：[[001,002,003,004]]\n猫：[[005,006", "狗：[[001,002,003,004]]\n猫："),
        ("[[001,002,003,004]] and the oth", "[[001,002,003,004]] and the oth"),
        ("未找到", "未找到"),
    ],
)
def test_of_a_cut_list_the_closed_boxes_stay(text: str, closed: str) -> None:
    assert close_cut_list(text) == closed
    assert close_cut_list(closed) == closed
