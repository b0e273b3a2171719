"""Random boxes, targets and texts for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from cogvlm_ft.grounding.targets import Box, Target

NOUNS = {"en": ("dog", "cup", "car on the road", "stop sign"), "zh": ("狗", "杯子", "路上的车", "一个人")}
SIDES = {
    "en": ("left", "Right", "leftmost", "RIGHT", "right-hand", "clockwise", "second", "bottom_left"),
    "zh": ("左边的", "右侧", "最左", "顺时针转的", "第二个", "东边的"),
}
COLOURS = {"en": ("red", "dark blue", "Grey", "golden"), "zh": ("红色的", "黑", "浅蓝色的", "彩色")}


@st.composite
def boxes_in(draw: st.DrawFn, size_px: tuple[int, int], least_px: int = 0, whole: bool = False) -> Box:
    """A box in a photo of this size, its edges and fractions of a pixel included, or whole pixels only."""
    edges = []
    for side in size_px:
        number = st.integers if whole else st.floats
        low = draw(number(0, side - least_px))
        edges.append((low, draw(number(low + least_px, side))))
    (x0, x1), (y0, y1) = edges
    return float(x0), float(y0), float(x1), float(y1)


@st.composite
def texts(draw: st.DrawFn, language: str, words: tuple[str, ...] = ()) -> str:
    """What somebody might call a thing, with one of the words in it if there are any."""
    noun = draw(st.sampled_from(NOUNS[language]))
    if not words:
        return noun
    parts = [draw(st.sampled_from(words)), noun]
    return (" " if language == "en" else "").join(parts if draw(st.booleans()) else reversed(parts))


@st.composite
def targets_in(draw: st.DrawFn, size_px: tuple[int, int], *, plain: bool = False) -> Target:
    """Of one or two boxes, or absent; unless plain, its phrase may speak of a side or a colour."""
    language = draw(st.sampled_from(("zh", "en")))
    boxes = draw(st.lists(boxes_in(size_px, 1), max_size=2))
    words = () if plain else draw(st.sampled_from(((), SIDES[language], COLOURS[language])))
    return Target(draw(texts(language, words)), language, tuple(boxes), draw(st.none() | texts(language)))
