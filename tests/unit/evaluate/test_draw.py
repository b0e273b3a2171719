from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cogvlm_ft.evaluate.draw import ANSWER_COLOUR, STRIP_COLOUR, TEXT_COLOUR, TRUTH_COLOUR, draw_boxes

GREY = (128, 128, 128)


def draw(size=(56, 56), truth=((),), predicted=((),), texts=(("Where?", "Here"),)) -> np.ndarray:
    return np.asarray(draw_boxes(Image.new("RGB", size, GREY), truth, predicted, texts))


def is_colour(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (pixels == colour).all(axis=-1)


@pytest.mark.parametrize(
    ("size", "drawn"), [((56, 56), (448, 448)), ((300, 150), (448, 224)), ((900, 500), (900, 500))]
)
def test_small_pictures_are_enlarged_and_large_ones_kept(size: tuple[int, int], drawn: tuple[int, int]) -> None:
    pixels = draw(size=size)
    width, height = drawn
    assert pixels.shape[1] == width
    assert is_colour(pixels[:height], GREY).all()
    assert is_colour(pixels[height], STRIP_COLOUR).all()


def test_true_boxes_are_green_at_their_place() -> None:
    picture = draw(truth=[[(10, 20, 30, 40)]])[:448]
    green = is_colour(picture, TRUTH_COLOUR)
    assert green[160, 80:241].all() and green[320, 80:241].all()
    assert green[160:321, 80].all() and green[160:321, 240].all()
    assert not green[170:310, 90:230].any()
    assert not is_colour(picture, ANSWER_COLOUR).any()


def test_predicted_boxes_are_dashed_red() -> None:
    picture = draw(predicted=[[(10, 20, 30, 40)]])[:448]
    top = picture[160, 80:240]
    red, white = is_colour(top, ANSWER_COLOUR), is_colour(top, (255, 255, 255))
    assert (red | white).all()
    assert red.sum() > white.sum() > 30
    assert not is_colour(picture, TRUTH_COLOUR).any()


def test_an_inverted_answer_is_drawn_and_an_unreadable_one_is_not() -> None:
    assert is_colour(draw(predicted=[[(30, 40, 10, 20)]])[:448], ANSWER_COLOUR).any()
    assert is_colour(draw(predicted=[None])[:448], GREY).all()


@pytest.mark.parametrize("box", [(0, 0, 56, 56), (0, 0, 0, 0), (55.9, 55.9, 56, 56), (20, 20, 20, 20)])
def test_boxes_at_the_edge_and_boxes_without_area_are_visible(box: tuple[float, float, float, float]) -> None:
    assert is_colour(draw(truth=[[box]])[:448], TRUTH_COLOUR).any()
    assert is_colour(draw(predicted=[[box]])[:448], ANSWER_COLOUR).any()


def test_labels_tell_turns_apart() -> None:
    def label_of(turn: int) -> np.ndarray:
        truth: list[list[tuple[int, int, int, int]]] = [[], []]
        truth[turn] = [(10, 20, 30, 40)]
        return draw(truth=truth, predicted=[[], []], texts=[("a", "b")] * 2)[138:160, 78:102]

    assert (label_of(0) != label_of(1)).any()


def test_the_strip_grows_with_the_texts_and_nothing_leaves_it() -> None:
    short = draw(texts=[("Where?", "Here")])
    long = draw(
        texts=[("Where is the dog that sits beside the second door on the left? " * 3, "[[001,002,003,004]]" * 9)]
    )
    assert len(long) > len(short) + 5 * 20
    strip = long[448:]
    assert is_colour(strip, TEXT_COLOUR).any() and is_colour(strip, ANSWER_COLOUR).any()
    assert is_colour(strip[:, -8:], STRIP_COLOUR).all()


def test_chinese_texts_can_be_drawn_on_any_machine() -> None:
    chinese = draw(texts=[("红色圆形在哪里？", "未找到\n指定目标")])
    other = draw(texts=[("蓝色圆形在哪里？", "未找到\n指定目标")])
    assert chinese.shape == other.shape
    assert (chinese != other).any()


def test_turns_without_a_partner_are_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="one entry per turn"):
        draw(truth=[[], []], predicted=[[]])
