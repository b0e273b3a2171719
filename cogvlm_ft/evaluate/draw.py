"""Draw an image: true boxes solid, answered boxes dashed, one colour for each turn, with all texts below."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from cogvlm_ft.colours import RIGHT_COLOUR, WRONG_COLOUR, ink_on, target_colour
from cogvlm_ft.evaluate.fonts import TextFont, text_font
from cogvlm_ft.grounding.overlap import pairwise_iou
from cogvlm_ft.grounding.targets import Box

LONGER_SIDE_PX = 448
LINE_PX = 3
DASH_PX, GAP_PX = 9, 6
MARGIN_PX, INDENT_PX = 10, 48
TEXT_PX, LABEL_TEXT_PX = 15, 13
LABEL_PX = 18
LINE_HEIGHT_PX = TEXT_PX + 7
MAX_LABELS = 24
"""Maximum number of boxes labelled with phrase and IoU; the others are only outlined."""
MAX_LABEL_CHARS = 18

TEXT_COLOUR, SOFT_COLOUR = "#1e1e1e", "#5c6675"
STRIP_COLOUR, HALO_COLOUR = "#f8f8f6", "#ffffff"
LEGEND, LEGEND_OF_ANSWERS = "— 标注 truth    - - 回答 answer", "- - 回答 answer"

# A word with its blanks (long ones are cut), or one character that is not ASCII.
_PIECE = re.compile(r"[!-~]{1,24} *|.")


@dataclass(frozen=True)
class DrawnTurn:
    """A question, its answer, and the truth as far as it is known. Boxes: pixels of the image, xyxy.

    readable: boxes, "not found" or free text. truth: the true text; None = not known. is_right: None = not scored.
    """

    prompt: str
    answer: str
    phrase: str = ""
    answer_boxes: Sequence[Box] = ()
    readable: bool = True
    truth: str | None = None
    truth_boxes: Sequence[Box] = ()
    is_right: bool | None = None


def draw_boxes(image: Image.Image, turns: Sequence[DrawnTurn]) -> Image.Image:
    """Draw the boxes of all turns, and a strip of their texts below; a small image is enlarged."""
    scale = max(1.0, LONGER_SIDE_PX / max(image.size))
    canvas = _enlarge(image.convert("RGB"), scale)
    pen = ImageDraw.Draw(canvas)
    for number, turn in enumerate(turns):
        for box in turn.truth_boxes:
            _draw_solid(pen, _scaled(box, scale), target_colour(number))
    for number, turn in enumerate(turns):
        for box in turn.answer_boxes:
            _draw_dashed(pen, _scaled(box, scale), target_colour(number))
    labels = [label for number, turn in enumerate(turns) for label in _labels(number, turn, scale)]
    for place, text, colour in labels[:MAX_LABELS]:
        _draw_label(pen, place, text, colour)
    return _stack(canvas, _draw_strip(turns, canvas.width))


def _enlarge(image: Image.Image, scale: float) -> Image.Image:
    """Enlarge an image; tiny ones keep hard pixels, others are smoothed."""
    if scale == 1:
        return image
    resample = Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.BICUBIC
    return image.resize((round(image.width * scale), round(image.height * scale)), resample)


def scale_box(box: Box, scale: float) -> Box:
    """Return the box of a photo in a smaller image of it."""
    x0, y0, x1, y1 = box
    return x0 * scale, y0 * scale, x1 * scale, y1 * scale


def _scaled(box: Box, scale: float) -> Box:
    """Scale a box to the enlarged image and order its corners, so that an inverted answer is drawn too."""
    x0, y0, x1, y1 = (value * scale for value in box)
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def _labels(number: int, turn: DrawnTurn, scale: float) -> Iterator[tuple[tuple[float, float], str, str]]:
    """Yield (top left corner, text, colour): the phrase over true boxes, phrase and IoU below answered ones."""
    colour, phrase = target_colour(number), turn.phrase or str(number + 1)
    phrase = phrase if len(phrase) <= MAX_LABEL_CHARS else f"{phrase[: MAX_LABEL_CHARS - 1]}…"
    for box in turn.truth_boxes:
        x0, y0, _, _ = _scaled(box, scale)
        yield (x0, y0 - LABEL_PX), phrase, colour
    answered = list(turn.answer_boxes)
    overlaps = pairwise_iou(answered, turn.truth_boxes) if answered and turn.truth_boxes else None
    for place, box in enumerate(answered):
        x0, _, _, y1 = _scaled(box, scale)
        text = phrase if overlaps is None else f"{phrase} {overlaps[place].max():.2f}"
        yield (x0, y1 + 1), text, colour


def _draw_solid(pen: ImageDraw.ImageDraw, box: Box, colour: str) -> None:
    """Outline a box between two thin light lines, visible on any image."""
    x0, y0, x1, y1 = box
    pen.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=HALO_COLOUR, width=LINE_PX + 2)
    pen.rectangle(box, outline=colour, width=LINE_PX)


def _draw_dashed(pen: ImageDraw.ImageDraw, box: Box, colour: str) -> None:
    """Draw dashes with white gaps, visible on a line of the same colour and on any image."""
    x0, y0, x1, y1 = box
    pen.rectangle(box, outline=HALO_COLOUR, width=LINE_PX)
    for y in (y0, y1 - LINE_PX + 1):
        for x in _dash_starts(x0, x1):
            pen.rectangle((x, y, max(x, min(x + DASH_PX, x1)), y + LINE_PX - 1), fill=colour)
    for x in (x0, x1 - LINE_PX + 1):
        for y in _dash_starts(y0, y1):
            pen.rectangle((x, y, x + LINE_PX - 1, max(y, min(y + DASH_PX, y1))), fill=colour)


def _dash_starts(start: float, end: float) -> list[float]:
    period = DASH_PX + GAP_PX
    return [start + index * period for index in range(int((end - start) // period) + 1)]


def _draw_label(pen: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, colour: str) -> None:
    """Draw a filled tag with its top left at `corner`, moved where it would leave the image."""
    font = text_font(LABEL_TEXT_PX)
    width = font.length(text) + 8
    picture_width, picture_height = pen.im.size
    x = max(min(corner[0], picture_width - width), 0)
    y = max(min(corner[1], picture_height - LABEL_PX), 0)
    pen.rectangle((x, y, x + width, y + LABEL_PX - 1), fill=colour)
    font.write(pen, (x + 4, y + LABEL_PX / 2), text, ink_on(colour))


def _draw_strip(turns: Sequence[DrawnTurn], width: int) -> Image.Image:
    """Write the legend, then per turn a check or cross, its number, the question, the answer and the true text."""
    font = text_font(TEXT_PX)
    legend = LEGEND if any(turn.truth_boxes for turn in turns) else LEGEND_OF_ANSWERS
    rows: list[tuple[int | None, str, str]] = [(None, legend, SOFT_COLOUR)]  # (turn that begins, line, colour)
    for number, turn in enumerate(turns):
        font.report_missing(f"{turn.prompt}{turn.truth or ''}")
        question = _wrap(turn.prompt, width, font)
        rows += [(None if place else number, line, TEXT_COLOUR) for place, line in enumerate(question)]
        unreadable = "" if turn.readable else "  (无法解析 unreadable)"
        rows += [(None, line, TEXT_COLOUR) for line in _wrap(f"回答 answer: {turn.answer}{unreadable}", width, font)]
        if turn.truth is not None:
            rows += [(None, line, SOFT_COLOUR) for line in _wrap(f"标注 truth: {turn.truth}", width, font)]
    strip = Image.new("RGB", (width, len(rows) * LINE_HEIGHT_PX + 2 * MARGIN_PX), STRIP_COLOUR)
    pen = ImageDraw.Draw(strip)
    for place, (begins, line, colour) in enumerate(rows):
        y = MARGIN_PX + (place + 0.5) * LINE_HEIGHT_PX
        font.write(pen, (MARGIN_PX + (INDENT_PX if place else 0), y), line, colour)
        if begins is not None:
            _draw_number(pen, (MARGIN_PX + INDENT_PX - 26, y), begins)
            _draw_mark(pen, (MARGIN_PX + 2, y), turns[begins].is_right)
    return strip


def _draw_number(pen: ImageDraw.ImageDraw, place: tuple[float, float], number: int) -> None:
    """Draw the number of a turn in its colour."""
    colour, font, text = target_colour(number), text_font(LABEL_TEXT_PX), str(number + 1)
    x, y = place
    pen.rectangle((x, y - 9, x + 20, y + 9), fill=colour)
    font.write(pen, (x + 10 - font.length(text) / 2, y), text, ink_on(colour))


def _draw_mark(pen: ImageDraw.ImageDraw, place: tuple[float, float], is_right: bool | None) -> None:
    """Draw a check, a cross, or nothing."""
    x, y = place
    if is_right:
        pen.line([(x, y), (x + 5, y + 5), (x + 14, y - 6)], fill=RIGHT_COLOUR, width=3, joint="curve")
    elif is_right is False:
        pen.line([(x + 1, y - 6), (x + 13, y + 6)], fill=WRONG_COLOUR, width=3)
        pen.line([(x + 1, y + 6), (x + 13, y - 6)], fill=WRONG_COLOUR, width=3)


def _wrap(text: str, width: int, font: TextFont) -> list[str]:
    """Wrap to the width of the strip, between words and between Chinese characters."""
    lines, line, length = [], "", 0.0
    for piece in _PIECE.findall(" ".join(text.splitlines())):
        if line.strip() and length + font.length(piece.rstrip()) > width - 2 * MARGIN_PX - INDENT_PX:
            lines.append(line)
            line, length = "", 0.0
        line += piece
        length += font.length(piece)
    return [*lines, line]


def _stack(top: Image.Image, bottom: Image.Image) -> Image.Image:
    stacked = Image.new("RGB", (top.width, top.height + bottom.height))
    stacked.paste(top, (0, 0))
    stacked.paste(bottom, (0, top.height))
    return stacked
