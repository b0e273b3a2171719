from __future__ import annotations

import numpy as np
import pytest

from cogvlm_ft.grounding.boxes import bins_from_box, boxes_from_bins, format_boxes, parse_boxes


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


def test_a_box_comes_back_within_half_a_bin() -> None:
    rng = np.random.default_rng(0)
    width, height = 1733, 977
    corners = np.sort(rng.uniform(0, 1, (200, 2, 2)), axis=1) * [width - 1, height - 1]
    for box in corners.reshape(-1, 4):
        bins = parse_boxes(format_boxes([tuple(box)], (width, height)))
        assert bins is not None
        error = np.abs(boxes_from_bins(bins, (width, height))[0] - box)
        assert (error <= np.array([width, height, width, height]) / 2000 + 1e-9).all()
