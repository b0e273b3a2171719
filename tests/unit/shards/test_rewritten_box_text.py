"""Box text of users: kept, written in the model's form, or refused; never learned in another form."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvlm_ft.grounding.boxes import parse_boxes
from cogvlm_ft.shards.formats.box_text import check_box_text, normalise_box_text
from cogvlm_ft.shards.packing.candidates import Rejected

WIDE = str.maketrans("0123456789", "０１２３４５６７８９")
BRACKETS = ["[]", "［］", "【】", "〔〕", "「」", "『』", "()", "（）", "{}", "<>"]
FORMS = ["{},{},{},{}", "({},{}),({},{})", "[{},{}],[{},{}]", "[[{},{}],[{},{}]]", "[[{},{};{},{}]]"]
PAIRS = ["；", "; ", ";\n"]


def normalised(text: str, *, is_prompt: bool = False) -> str:
    return normalise_box_text(text, "the answer", is_prompt=is_prompt)


@st.composite
def corners(draw: st.DrawFn) -> list[str]:
    """A box of padded thousandths that is not square."""
    x0, y0 = draw(st.integers(0, 99)), draw(st.integers(0, 900))
    x1, y1 = draw(st.integers(x0 + 1, 999)), draw(st.integers(y0 + 1, 999))
    return [f"{value:03d}" for value in (x0, y0, x1, y1)]


def joined(boxes: list[list[str]]) -> str:
    return f"[[{';'.join(','.join(box) for box in boxes)}]]"


@settings(max_examples=60)
@given(
    st.lists(corners(), min_size=1, max_size=3),
    st.sampled_from(BRACKETS),
    st.sampled_from([",", "，", "、", " ", ", ", " ，", ",\n", "，\u3000"]),
    st.sampled_from(PAIRS),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["", "**", "*", "`"]),
    st.sampled_from(["所在区域为", "The dog is at ", "狗。", ""]),
)
def test_padded_thousandths_in_any_brackets(
    boxes: list[list[str]], ends: str, comma: str, pair: str, wide: bool, nested: bool, mark: str, before: str
) -> None:
    depth = 2 if nested else 1
    text = pair.join(comma.join(box) for box in boxes)
    text = text.translate(WIDE) if wide else text
    given_text = f"{before}{mark}{ends[0] * depth}{text}{ends[1] * depth}{mark}。"
    found = normalised(given_text)
    assert found in (f"{before}{joined(boxes)}。", f"{before}{mark}{joined(boxes)}{mark}。")
    assert found == normalised(found) and parse_boxes(found) == [tuple(map(int, box)) for box in boxes]


@settings(max_examples=60)
@given(
    corners(),
    st.sampled_from(["{},{},{},{}", "({},{}),({},{})", "[{},{}],[{},{}]", "[[{},{}],[{},{}]]", "[[{},{};{},{}]]"]),
)
def test_padded_points_and_bare_numbers(box: list[str], form: str) -> None:
    for text in (form.format(*box), form.format(*box).replace(",", "，").replace("(", "（").replace(")", "）")):
        assert normalised(f"区域为{text}") == f"区域为{joined([box])}"


PIECES = [*"[]【】（），、; *-.\n７狗,", "086", "540", "400", "760", "1000", "0.5", "x0"]


@settings(max_examples=200)
@given(st.lists(st.sampled_from(PIECES), max_size=24).map("".join), st.booleans())
def test_any_text_is_whole_or_refused(text: str, is_prompt: bool) -> None:
    """What comes out has exact boxes only, keeps every number, and does not change again."""
    try:
        found = normalised(text, is_prompt=is_prompt)
    except Rejected as rejected:
        assert rejected.level == "turn" and rejected.reason in ("bad_box_text", "inverted_box")
        return
    assert normalised(found, is_prompt=is_prompt) == found
    digits = [str(int(char)) for char in text if char.isdecimal()]
    assert [char for char in found if char.isdecimal() and char.isascii()] == digits or found == text
    for group in re.findall(r"\[\[(.*?)\]\]", found):
        assert (
            re.fullmatch(r"\d{3}(,\d{3}){3}(;\d{3}(,\d{3}){3})*", group)
            or not any(map(str.isdigit, group))
            or is_prompt
        )


@pytest.mark.parametrize(
    "text",
    [
        "A dog.",
        "见[1]和[2]。",
        "rooms 101, 102, 103, 104",
        "在1990、1995、2000、2005年",
        "100,000,000,000元",
        "The numbers are 1, 2, 3 and 4.",
        "电话010-123-456-789",
        "192.168.000.001",
        "狗[[086,540,400,760]]和猫[[001,002,003,004;005,006,007,008]]。",
        "[[086,540,400,760]]。共1,2,3,4",
        "a[0][1]",
        "[[注]]",
    ],
)
def test_other_text_is_kept(text: str) -> None:
    assert normalised(text) == text
    check_box_text(text, "the answer", is_prompt=False)


@pytest.mark.parametrize(
    "text",
    [
        "[[86,540,400,760]]",
        "[[0.086,0.540,0.4,0.76]]",
        "[[1086,540,400,760]]",
        "[[-086,540,400,760]]",
        "[[086,540,400]]",
        "[[086,540,400,540,400,760,086,760]]",
        "[[086,540;400,540;400,760;086,760]]",
        "[540,640,700,760]",
        "[86, 540, 400, 760]",
        "(86,540),(400,760)",
        "【86，540，400，760】",
        "086 540 400 760",
        "(086,540)-(400,760)",
        "左上角（86，540），右下角（400，760）",
        "坐标(86,540)到(400,760)",
        "x1: 86, y1: 540, x2: 400, y2: 760",
        "x_min=0.1, y_min=0.2, x_max=0.3, y_max=0.4",
        "{'x0': 86, 'y0': 54, 'x1': 400, 'y1': 376}",
        "bbox: 0.1 0.2 0.3 0.4",
        "所在区域为86,540,400,760",
        "**狗[[086,540,400,760]]**",
        "[[x0,y0,x1,y1]]",
        "【【x0，y0，x1，y1】】",
        "[[x0=086, y0=540, x1=400, y1=760]]",
        "<|ref|>狗<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>",
        "<ref>dog</ref><box>[[100, 200, 500, 600]]</box>",
        '{"box_2d": [1, 2, 3, 4]}',
        "<loc0100><loc0200><loc0300><loc0400> dog",
    ],
)
def test_what_is_not_certain_is_refused(text: str) -> None:
    with pytest.raises(Rejected, match=r"expected \[\[x0,y0,x1,y1\]\]: thousandths") as rejected:
        normalised(text)
    assert rejected.value.reason == "bad_box_text"


def test_prompts_may_ask_for_the_form() -> None:
    assert normalised("用[[x0,y0,x1,y1]]", is_prompt=True) == "用[[x0,y0,x1,y1]]"
    assert normalised("用【【x0，y0，x1，y1】】回答", is_prompt=True) == "用[[x0,y0,x1,y1]]回答"


@pytest.mark.parametrize("text", ["[[400,540,086,760]]", "[[ 400，540，086，760 ]]", "[[086,760,400,540]]"])
def test_inverted_boxes_are_refused(text: str) -> None:
    with pytest.raises(Rejected, match="expected x0 <= x1 and y0 <= y1"):
        normalised(text)


def test_the_exact_form_is_checked_without_changing_it() -> None:
    with pytest.raises(Rejected, match=r"write '\[\[086,540,400,760\]\]'"):
        check_box_text("[[086, 540, 400, 760]]", "the answer", is_prompt=False)
