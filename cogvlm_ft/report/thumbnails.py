"""Thumbnails with boxes for a page: a JPEG as a data URI, with the boxes over it as SVG."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape
from PIL import Image

from cogvlm_ft.colours import TARGET_COLOURS
from cogvlm_ft.data.reader import MAX_PIXELS, Sample, ShardReader, decode_image
from cogvlm_ft.data.stored_photo import whole_image
from cogvlm_ft.errors import DataError, ServerError
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.html_page import text_width

logger = logging.getLogger(__name__)

SIDE_PX, ZOOM_SIDE_PX, JPEG_QUALITY = 480, 240, 72
SMALL_PX = 40
"""Annotated boxes smaller than this in the thumbnail are also shown enlarged."""
MAX_BOXES, MAX_LABELS = 200, 16
TEXT_SHARE = 0.042
"""Height of the labels, as a fraction of the drawing's side."""
_MAX_LABEL_CHARS = 22

Region = tuple[float, float, float, float]


@dataclass(frozen=True)
class DrawnBox:
    """A box to draw. style: truth (solid) or answer (dashed). number: of its target, for its colour."""

    box: Box
    style: str
    number: int = 0
    label: str = ""


class Photos:
    """Finds images by key: in the shards, or among the files that an evaluation kept.

    reader: None where the shards no longer exist. kept: files by key, perhaps shrunk.
    """

    def __init__(self, reader: ShardReader | None, kept: Mapping[str, Path] | None = None) -> None:
        self.reader = reader
        self._kept = kept or {}
        self._numbers: dict[str, int] = {}

    def look_up(self, keys: Iterable[str]) -> None:
        """Find the positions of these keys in one pass over the index."""
        missing = set(keys) - set(self._numbers)
        for i in range(len(self.reader) if self.reader and missing else 0):
            assert self.reader is not None
            key = self.reader.index.key(i)
            if key in missing:
                self._numbers[key] = i
                missing.remove(key)
                if not missing:
                    return

    def sample(self, key: str) -> Sample | None:
        """Read the sample of a key that was looked up; None if it is not in the shards or cannot be read."""
        if self.reader is None or key not in self._numbers:
            return None
        try:
            return self.reader.read(self._numbers[key])
        except (DataError, ServerError) as error:
            logger.warning("an image of the report cannot be shown: %s", error)
            return None

    def image(self, key: str) -> Image.Image | None:
        """Load the RGB image of a key; None if it cannot be shown."""
        sample = self.sample(key)
        if sample is not None:
            return whole_image(sample.image)
        if key not in self._kept:
            return None
        try:
            return decode_image(self._kept[key].read_bytes(), key, MAX_PIXELS)
        except (OSError, DataError) as error:
            logger.warning("%s cannot be shown: %s", self._kept[key], error)
            return None


class Thumbnails:
    """Draws thumbnails until `max_bytes` of HTML are used up."""

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes, self.num_left_out = 0, 0
        self._max_bytes = max_bytes

    def draw(self, image: Image.Image | None, size_px: tuple[int, int], boxes: Sequence[DrawnBox], alt: str) -> Markup:
        """Return the HTML; empty if there is no image or no room for it.

        size_px: (width, height) that the boxes belong to; the image may be smaller.
        """
        if image is None or min(size_px) < 1:
            return Markup()
        shown = [_svg(image, size_px, (0, 0, *size_px), SIDE_PX, boxes, alt)]
        zoom = zoom_region([each.box for each in boxes if each.style == "truth"], size_px)
        if zoom:
            shown.append(_svg(image, size_px, zoom, ZOOM_SIDE_PX, boxes, ""))
        num_bytes = sum(map(len, shown))
        if self.num_bytes + num_bytes > self._max_bytes:
            self.num_left_out += 1
            return Markup()
        self.num_bytes += num_bytes
        return Markup(f'<div class="pictures{" two" if zoom else ""}">{"".join(shown)}</div>')


def zoom_region(truth: Sequence[Box], size_px: tuple[int, int]) -> Region | None:
    """Return a square around the first true box, six times as long, within the image; None if the box is not small."""
    if not truth:
        return None
    x0, y0, x1, y1 = truth[0]
    side = max(x1 - x0, y1 - y0)
    if not 0 < side < SMALL_PX * max(size_px) / SIDE_PX:
        return None
    half = max(3 * side, 8.0)
    x, y = (
        max(half, min(size - half, (low + high) / 2))
        for low, high, size in zip((x0, y0), (x1, y1), size_px, strict=True)
    )
    return x - half, y - half, x + half, y + half


def _svg(
    image: Image.Image, size_px: tuple[int, int], region: Region, side_px: int, boxes: Sequence[DrawnBox], alt: str
) -> str:
    """Draw the region, in pixels of `size_px`. Boxes are clipped by the drawing."""
    x0, y0, x1, y1 = region
    part = (max(x0, 0), max(y0, 0), min(x1, size_px[0]), min(y1, size_px[1]))
    width, height = part[2] - part[0], part[3] - part[1]
    scale_x, scale_y = image.width / size_px[0], image.height / size_px[1]
    source = (part[0] * scale_x, part[1] * scale_y, part[2] * scale_x, part[3] * scale_y)
    shrink = min(1.0, side_px / max(source[2] - source[0], source[3] - source[1]))
    shown_px = [max(1, round(shrink * (source[i + 2] - source[i]))) for i in (0, 1)]
    small = image.resize((shown_px[0], shown_px[1]), Image.Resampling.BICUBIC, source, reducing_gap=2.0)
    place = f'x="{part[0]:.1f}" y="{part[1]:.1f}" width="{width:.1f}" height="{height:.1f}"'
    outlines = "".join(_rect(each) for each in boxes[:MAX_BOXES])
    labelled = [each for each in boxes if each.label][:MAX_LABELS]
    outlines += "".join(_label(each, region) for each in labelled)
    return (
        f'<svg class="photo" viewBox="{x0:.1f} {y0:.1f} {x1 - x0:.1f} {y1 - y0:.1f}" role="img" '
        f'aria-label="{escape(alt)}"><image href="{_uri(small)}" {place} preserveAspectRatio="none"/>{outlines}</svg>'
    )


def _rect(drawn: DrawnBox) -> str:
    """Draw a box on a dark edge, visible on any image. An inverted box is the rectangle between its corners."""
    (x0, x1), (y0, y1) = sorted((drawn.box[0], drawn.box[2])), sorted((drawn.box[1], drawn.box[3]))
    place = f'x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"'
    colour = f"t{drawn.number % len(TARGET_COLOURS)}"
    return f'<rect class="edge of-{drawn.style}" {place}/><rect class="{drawn.style} {colour}" {place}/>'


def _label(drawn: DrawnBox, region: Region) -> str:
    """Write a label: above a true box, below an answered one, moved to where it is within the drawing."""
    left, top, right, bottom = region
    size = TEXT_SHARE * max(right - left, bottom - top)
    text = drawn.label if len(drawn.label) <= _MAX_LABEL_CHARS else f"{drawn.label[: _MAX_LABEL_CHARS - 1]}…"
    width = size * (0.5 + text_width(text))
    (x, _), (y0, y1) = sorted((drawn.box[0], drawn.box[2])), sorted((drawn.box[1], drawn.box[3]))
    y = y0 - 1.3 * size if drawn.style == "truth" else y1
    x, y = max(left, min(x, right - width)), max(top, min(y, bottom - 1.3 * size))
    return (
        f'<g class="label of-{drawn.style} t{drawn.number % len(TARGET_COLOURS)}">'
        f'<rect class="tag" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{1.3 * size:.1f}"/>'
        f'<text x="{x + 0.25 * size:.1f}" y="{y + 0.98 * size:.1f}" font-size="{size:.1f}">{escape(text)}</text></g>'
    )


def _uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
