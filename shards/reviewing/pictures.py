"""Thumbnails of images with their boxes, as data URIs."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass

from PIL import Image, ImageDraw

from cogvlm_ft.data.reader import MAX_PIXELS, decode_image
from cogvlm_ft.data.record import BadSampleError
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.packing.candidates import Rejected
from cogvlm_ft.shards.reviewing.sources import read_photo
from cogvlm_ft.shards.reviewing.suspects import View

SIDE_PX = 480
_ZOOM_SIDE_PX = 240
_SMALL_PX = 40
"""A suspicious box smaller than this in the thumbnail is also shown enlarged."""
_TINY_PX = 200
"""An image up to this size is enlarged."""
_QUALITY = 72
_MARKED, _INSTEAD, _OTHER, _OUTSIDE = (229, 57, 53), (38, 166, 91), (255, 255, 255), (128, 128, 132)


@dataclass(frozen=True)
class Picture:
    """uri: of a JPEG. zoom: the suspicious box enlarged, if it is small."""

    uri: str
    zoom: str | None


def draw_view(view: View) -> Picture | None:
    """Draw an image with its boxes; None if it cannot be shown."""
    try:
        data = read_photo(view.place)
        image = decode_image(data, view.image, MAX_PIXELS, upright=view.upright)
    except (Rejected, BadSampleError):
        return None
    region = _region(view, image.size)
    zoom = zoom_region(view.marked[0], image.size) if len(view.marked) == 1 else None
    return Picture(
        jpeg_uri(_drawn(image, view, region, SIDE_PX)),
        jpeg_uri(_drawn(image, view, zoom, _ZOOM_SIDE_PX)) if zoom else None,
    )


def _region(view: View, size_px: tuple[int, int]) -> Box:
    """Return the image, extended to boxes that reach outside by up to half of its size."""
    width, height = size_px
    boxes = (*view.marked, *view.instead)
    return (
        max(min([0.0, *(min(box[0], box[2]) for box in boxes)]), -0.5 * width),
        max(min([0.0, *(min(box[1], box[3]) for box in boxes)]), -0.5 * height),
        min(max([width, *(max(box[0], box[2]) for box in boxes)]), 1.5 * width),
        min(max([height, *(max(box[1], box[3]) for box in boxes)]), 1.5 * height),
    )


def zoom_region(box: Box, size_px: tuple[int, int]) -> Box | None:
    """Return the region around a small box, six times its size; None if the box is not small."""
    x0, y0, x1, y1 = box
    side = max(x1 - x0, y1 - y0)
    if not 1 <= side < _SMALL_PX * max(size_px) / SIDE_PX or not (0 <= x0 <= size_px[0] and 0 <= y0 <= size_px[1]):
        return None
    half = max(3 * side, 12.0)
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return x - half, y - half, x + half, y + half


def cut_out(image: Image.Image, region: Box, side_px: int) -> tuple[Image.Image, float]:
    """Return a region of an image, at most `side_px` on a side, and its scale; a tiny one is enlarged.

    What is beyond the edges of the image is grey.
    """
    left, top, right, bottom = region
    is_part = right - left < image.width or bottom - top < image.height
    scale = min(side_px / max(right - left, bottom - top), 16.0 if is_part or max(image.size) <= _TINY_PX else 1.0)
    size = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    corner = max(0, math.floor(left)), max(0, math.floor(top))
    end = min(image.width, math.ceil(right)), min(image.height, math.ceil(bottom))
    canvas = Image.new("RGB", size, _OUTSIDE)
    if corner[0] < end[0] and corner[1] < end[1]:
        part_size = max(1, round((end[0] - corner[0]) * scale)), max(1, round((end[1] - corner[1]) * scale))
        part = image.resize(part_size, Image.Resampling.BICUBIC, (*corner, *end), reducing_gap=2.0)
        canvas.paste(part, (round((corner[0] - left) * scale), round((corner[1] - top) * scale)))
    return canvas, scale


def _drawn(image: Image.Image, view: View, region: Box, side_px: int) -> Image.Image:
    """Draw the region with all boxes."""
    canvas, scale = cut_out(image, region, side_px)
    pen = ImageDraw.Draw(canvas)
    for boxes, colour, width in ((view.others, _OTHER, 1), (view.instead, _INSTEAD, 3), (view.marked, _MARKED, 3)):
        for box in boxes:
            _outline(pen, box, region, scale, canvas.size, colour, width)
    return canvas


def _outline(
    pen: ImageDraw.ImageDraw,
    box: Box,
    region: Box,
    scale: float,
    size: tuple[int, int],
    colour: tuple[int, int, int],
    width: int,
) -> None:
    """Outline a box on a dark edge, visible on any image; clipped to the canvas, so that nothing overflows."""
    xs = sorted(min(max((x - region[0]) * scale, -2.0), size[0] + 1.0) for x in (box[0], box[2]))
    ys = sorted(min(max((y - region[1]) * scale, -2.0), size[1] + 1.0) for y in (box[1], box[3]))
    pen.rectangle((xs[0] - 1, ys[0] - 1, xs[1] + 1, ys[1] + 1), outline=(0, 0, 0), width=width + 1)
    pen.rectangle((xs[0], ys[0], xs[1], ys[1]), outline=colour, width=width)


def jpeg_uri(image: Image.Image) -> str:
    """Encode a picture for the page."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY, subsampling=0, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
