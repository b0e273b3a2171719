from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cogvlm_ft.colours import RIGHT_COLOUR, TARGET_COLOURS, WRONG_COLOUR, ink_on, rgb, style_sheet
from cogvlm_ft.evaluate import fonts
from cogvlm_ft.evaluate.draw import STRIP_COLOUR, TEXT_COLOUR, DrawnTurn, draw_boxes
from cogvlm_ft.evaluate.evaluate import drawn_turn
from cogvlm_ft.evaluate.fonts import SHIPPED_FONT, TextFont, glyph
from cogvlm_ft.grounding.metrics import AnswerScore
from cogvlm_ft.grounding.prediction import Prediction

GREY, FIRST, SECOND = (128, 128, 128), *map(rgb, TARGET_COLOURS[:2])
BOX = (10, 20, 30, 40)


def draw(*turns: DrawnTurn, size: tuple[int, int] = (56, 56)) -> np.ndarray:
    shown = turns or (DrawnTurn("Where?", "Here"),)
    return np.asarray(draw_boxes(Image.new("RGB", size, GREY), shown))


def turn(**fields: object) -> DrawnTurn:
    return DrawnTurn(**{"prompt": "Where?", "answer": "Here", **fields})


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
    assert is_colour(pixels[height], rgb(STRIP_COLOUR)).all()


def test_true_boxes_are_solid_at_their_place_in_the_colour_of_their_turn() -> None:
    first = is_colour(draw(turn(truth_boxes=[BOX]))[:448], FIRST)
    assert first[160, 80:241].all() and first[320, 80:241].all()
    assert first[160:321, 80].all() and first[160:321, 240].all()
    assert not first[170:310, 90:230].any()
    second = draw(turn(), turn(truth_boxes=[BOX]))[:448]
    assert is_colour(second, SECOND)[160, 80:241].all() and not is_colour(second, FIRST).any()


def test_answered_boxes_are_dashed_in_the_colour_of_their_turn() -> None:
    top = draw(turn(answer_boxes=[BOX]))[160, 80:240]
    dashes, gaps = is_colour(top, FIRST), is_colour(top, (255, 255, 255))
    assert (dashes | gaps).all()
    assert dashes.sum() > gaps.sum() > 30


def test_only_an_unreadable_answer_is_called_so() -> None:
    """A present target that is answered with "not found" has no boxes either, but was read."""
    known = dict(key="a", turn=0, prompt="Where?", answer="Here", truth="", boxes_xyxy=None, truth_boxes_xyxy=[BOX])
    missed, garbled = AnswerScore("present", said_not_found=True), AnswerScore("present", readable=False)
    given = [Prediction(**known, image_size_px=(56, 56), score=score) for score in (missed, garbled, None)]
    shown = [drawn_turn(prediction, 1.0) for prediction in given]
    assert [each.readable for each in shown] == [True, False, True]
    widths = [(draw(each)[448:] != rgb(STRIP_COLOUR)).any(axis=(0, 2)).nonzero()[0].max() for each in shown]
    assert widths[0] == widths[2] < widths[1], "the remark beside the answer"


def test_an_inverted_answer_is_drawn_and_an_unreadable_one_is_not() -> None:
    assert is_colour(draw(turn(answer_boxes=[(30, 40, 10, 20)]))[:448], FIRST).any()
    assert is_colour(draw(turn(readable=False))[:448], GREY).all()


@pytest.mark.parametrize("box", [(0, 0, 56, 56), (0, 0, 0, 0), (55.9, 55.9, 56, 56), (20, 20, 20, 20)])
def test_boxes_at_the_edge_and_boxes_without_area_are_visible(box: tuple[float, float, float, float]) -> None:
    assert is_colour(draw(turn(truth_boxes=[box]))[:448], FIRST).any()
    assert is_colour(draw(turn(answer_boxes=[box]))[:448], FIRST).any()


def test_a_label_holds_the_phrase_and_below_an_answer_its_iou() -> None:
    def below(**fields: object) -> np.ndarray:
        return draw(turn(answer_boxes=[BOX], **fields))[321:341, 80:230]

    assert (below(phrase="dog") != below(phrase="cat")).any()
    exact, near = below(truth_boxes=[BOX]), below(truth_boxes=[(12, 20, 32, 40)])
    assert is_colour(exact, FIRST).sum() > is_colour(below(), FIRST).sum(), "the tag is wider with the IoU"
    assert (exact[1:19] != near[1:19]).any()
    many = draw(turn(phrase="dog", truth_boxes=[(x, y, x + 1, y + 1) for x in range(0, 50, 5) for y in (5, 50)] * 9))
    assert many.shape[1] == 448, "a crowd is outlined, not covered with labels"


def test_right_and_wrong_answers_are_marked_by_shape_and_colour() -> None:
    left = {mark: draw(turn(is_right=mark))[448:, :28] for mark in (True, False, None)}
    assert is_colour(left[True], rgb(RIGHT_COLOUR)).any() and not is_colour(left[True], rgb(WRONG_COLOUR)).any()
    assert is_colour(left[False], rgb(WRONG_COLOUR)).any() and not is_colour(left[False], rgb(RIGHT_COLOUR)).any()
    assert not any(is_colour(left[None], rgb(colour)).any() for colour in (RIGHT_COLOUR, WRONG_COLOUR))


def test_the_strip_grows_with_the_texts_and_nothing_leaves_it() -> None:
    short, with_truth = draw(), draw(turn(truth="[[001,002,003,004]]"))
    question = "Where is the dog that sits beside the second door on the left? " * 3
    long = draw(turn(prompt=question, answer="[[001,002,003,004]]" * 9))
    assert len(short) < len(with_truth) < len(long) - 4 * 20
    strip = long[448:]
    assert is_colour(strip, rgb(TEXT_COLOUR)).any()
    assert is_colour(strip[:, -8:], rgb(STRIP_COLOUR)).all()


# Fonts


def test_chinese_is_written_on_any_machine_without_an_installed_font() -> None:
    """None of these characters looks like what the font draws for a missing one, and no two are alike."""
    font = TextFont(15, installed=iter(()))
    face = font._find("绿")
    text = "绿色红圆形在哪里未找到指定目标狗猫的了，。？！：（）「」ＡＢ１２鼎麒éßабв→①ひカ"
    drawn = {char: glyph(face, char) for char in text}
    assert fonts.NO_CHARACTER not in text and glyph(face, fonts.NO_CHARACTER) not in drawn.values()
    assert len(set(drawn.values())) == len(set(text))
    assert {id(font._find(char)) for char in text} == {id(face)}
    common = (bytes((row, cell)).decode("gb2312") for row in range(0xB0, 0xD7) for cell in range(0xA1, 0xFA))
    assert font.length("".join(common)) == pytest.approx(15 * 39 * 89, rel=0.01)
    assert SHIPPED_FONT.stat().st_size < 4_000_000 and "SIL OPEN FONT LICENSE" in licence_of_font()


def licence_of_font() -> str:
    return (SHIPPED_FONT.parent / "OFL.txt").read_text(encoding="utf-8").upper()


def test_what_the_font_lacks_comes_from_an_installed_one_else_from_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fonts, "_reported", set())
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    broken = tmp_path / "damaged.ttf"
    other = TextFont(15, shipped=broken, installed=iter([broken, tmp_path / "gone.ttf", SHIPPED_FONT]))
    assert glyph(other._find("绿"), "绿") == glyph(TextFont(15, installed=iter(()))._find("绿"), "绿")
    assert not caplog.records
    alone = TextFont(15, installed=iter(()))
    text = "龘𠮷\U0001f600 \udce9\n"
    alone.write(ImageDraw.Draw(Image.new("RGB", (99, 30))), (0, 15), text, "#000000")
    assert not caplog.records, "an answer of an untrained model may hold anything"
    alone.report_missing(text)
    assert len(caplog.records) == 1 and "U+9F98" in caplog.text and "Install fonts-noto-cjk" in caplog.text


def test_no_escapes_are_written_without_any_font(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_reported", {"reported before"})
    font = TextFont(15, shipped=Path("gone.ttf"), installed=iter(()))
    assert font.length("绿") < font.length("\\u7eff")


def test_the_colours_of_pages_are_those_of_drawn_images() -> None:
    assert tuple(re.findall(r"--t: (#\w{6})", style_sheet())) == TARGET_COLOURS
    assert len(set(TARGET_COLOURS)) == len(TARGET_COLOURS)
    assert (ink_on("#0072b2"), ink_on("#f0e442")) == ("#ffffff", "#000000")
