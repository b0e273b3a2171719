"""Draw an image: true boxes green, predicted boxes red and dashed, questions and answers below."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from cogvlm_ft.grounding.targets import Box

LONGER_SIDE_PX = 448
LINE_PX = 3
DASH_PX, GAP_PX = 9, 6
MARGIN_PX = 10
TEXT_PX = 15
LABEL_PX = 20

TRUTH_COLOUR = (0, 150, 60)
ANSWER_COLOUR = (220, 30, 30)
TEXT_COLOUR = (30, 30, 30)
STRIP_COLOUR = (248, 248, 246)

# Fonts with Chinese characters on Linux distributions and macOS.
CHINESE_FONTS = (
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/noto-cjk/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/google-noto-cjk/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/google-noto-sans-cjk-fonts/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/truetype/wqy/wqy-microhei.ttc",
    "/usr/share/fonts/wqy-microhei/wqy-microhei.ttc",
    "/usr/share/fonts/truetype/wqy/wqy-zenhei.ttc",
    "/usr/share/fonts/wqy-zenhei/wqy-zenhei.ttc",
    "/usr/share/fonts/truetype/arphic/uming.ttc",
    "/System/Library/Fonts/PingFang.ttc",
)

# An escape, a word with its blanks (long ones are cut), or one character that is not ASCII.
_PIECE = re.compile(r"\\u[0-9a-f]{4}|[!-\[\]-~]{1,24} *|.")

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw_boxes(
    image: Image.Image,
    truth_boxes: Sequence[Sequence[Box]],
    predicted_boxes: Sequence[Sequence[Box] | None],
    texts: Sequence[tuple[str, str]],
) -> Image.Image:
    """Draw the boxes of all turns, and a strip of their texts below; a small image is enlarged.

    truth_boxes, predicted_boxes: per turn its boxes in pixels of `image`, xyxy; None = the answer was unreadable.
    texts: per turn (prompt, answer). Turns are numbered from 1.
    """
    assert len(truth_boxes) == len(predicted_boxes) == len(texts), "one entry per turn in each"
    scale = max(1.0, LONGER_SIDE_PX / max(image.size))
    canvas = _enlarge(image.convert("RGB"), scale)
    font, writes_chinese = _load_font()
    pen = ImageDraw.Draw(canvas)
    true_boxes = [(str(turn), _scaled(box, scale)) for turn, boxes in enumerate(truth_boxes, 1) for box in boxes]
    answers = [(str(turn), _scaled(box, scale)) for turn, boxes in enumerate(predicted_boxes, 1) for box in boxes or ()]
    for _, box in true_boxes:
        pen.rectangle(box, outline=TRUTH_COLOUR, width=LINE_PX)
    for _, box in answers:
        _draw_dashed(pen, box)
    for label, (x0, y0, _, _) in true_boxes:
        _draw_label(pen, (x0, y0 - LABEL_PX), label, TRUTH_COLOUR, font)
    for label, (_, _, x1, y1) in answers:
        _draw_label(pen, (x1 - LABEL_PX, y1), label, ANSWER_COLOUR, font)
    legend = "green: truth   red: answer" if true_boxes else "red: answer"
    return _stack(canvas, _draw_strip(legend, texts, canvas.width, font, writes_chinese))


def _enlarge(image: Image.Image, scale: float) -> Image.Image:
    """Enlarge an image; tiny ones keep hard pixels, others are smoothed."""
    if scale == 1:
        return image
    resample = Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.BICUBIC
    return image.resize((round(image.width * scale), round(image.height * scale)), resample)


def _scaled(box: Box, scale: float) -> Box:
    """Scale a box to the enlarged image and order its corners, so that an inverted answer is drawn too."""
    x0, y0, x1, y1 = (value * scale for value in box)
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def _draw_dashed(pen: ImageDraw.ImageDraw, box: Box) -> None:
    """Draw red dashes with white gaps, visible on a green line and on any image."""
    x0, y0, x1, y1 = box
    pen.rectangle(box, outline="white", width=LINE_PX)
    for y in (y0, y1 - LINE_PX + 1):
        for x in _dash_starts(x0, x1):
            pen.rectangle((x, y, max(x, min(x + DASH_PX, x1)), y + LINE_PX - 1), fill=ANSWER_COLOUR)
    for x in (x0, x1 - LINE_PX + 1):
        for y in _dash_starts(y0, y1):
            pen.rectangle((x, y, x + LINE_PX - 1, max(y, min(y + DASH_PX, y1))), fill=ANSWER_COLOUR)


def _dash_starts(start: float, end: float) -> list[float]:
    period = DASH_PX + GAP_PX
    return [start + index * period for index in range(int((end - start) // period) + 1)]


def _draw_label(
    pen: ImageDraw.ImageDraw, corner: tuple[float, float], label: str, colour: tuple[int, int, int], font: Font
) -> None:
    """Draw a filled tag with its top left at `corner`, moved where it would leave the image."""
    picture_width, picture_height = pen.im.size
    x = min(max(corner[0], 0), picture_width - LABEL_PX)
    y = min(max(corner[1], 0), picture_height - LABEL_PX)
    pen.rectangle((x, y, x + LABEL_PX, y + LABEL_PX), fill=colour)
    pen.text((x + LABEL_PX / 2, y + LABEL_PX / 2), label, fill="white", font=font, anchor="mm")


def _draw_strip(
    legend: str, texts: Sequence[tuple[str, str]], width: int, font: Font, writes_chinese: bool
) -> Image.Image:
    """Write the legend, then per turn its number, its question and, in red, its answer."""
    lines = [(legend, TEXT_COLOUR)]
    for number, (prompt, answer) in enumerate(texts, 1):
        lines += [(line, TEXT_COLOUR) for line in _wrap(f"{number}  {prompt}", width, font, writes_chinese)]
        lines += [(line, ANSWER_COLOUR) for line in _wrap(f"    {answer}", width, font, writes_chinese)]
    line_height = TEXT_PX + 7
    strip = Image.new("RGB", (width, len(lines) * line_height + 2 * MARGIN_PX), STRIP_COLOUR)
    pen = ImageDraw.Draw(strip)
    for index, (line, colour) in enumerate(lines):
        pen.text((MARGIN_PX, MARGIN_PX + index * line_height), line, fill=colour, font=font)
    return strip


def _wrap(text: str, width: int, font: Font, writes_chinese: bool) -> list[str]:
    """Wrap to the width of the strip, between words and between Chinese characters."""
    shown = " ".join(text.splitlines())
    if not writes_chinese:
        shown = shown.encode("ascii", "backslashreplace").decode()
    lines, line = [], ""
    for piece in _PIECE.findall(shown):
        if line.strip() and font.getlength(line + piece.rstrip()) > width - 2 * MARGIN_PX:
            lines.append(line)
            line = "    "
        line += piece
    return [*lines, line]


def _stack(top: Image.Image, bottom: Image.Image) -> Image.Image:
    stacked = Image.new("RGB", (top.width, top.height + bottom.height))
    stacked.paste(top, (0, 0))
    stacked.paste(bottom, (0, top.height))
    return stacked


def _load_font() -> tuple[Font, bool]:
    """Load a font, and tell whether it has Chinese characters; without them, texts are written in escapes."""
    for path in CHINESE_FONTS:
        with contextlib.suppress(OSError):  # not installed, damaged, or no memory to map it
            return ImageFont.truetype(path, TEXT_PX), True
    return ImageFont.load_default(TEXT_PX), False
