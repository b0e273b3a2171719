"""Augmentation of training images: crops, mirroring and colours that keep boxes and texts correct."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageEnhance

from cogvlm_ft.data.frames import GRID_PX, Frame, fit, whole_frame
from cogvlm_ft.data.mentions import mentions_colour, mentions_place, mentions_side
from cogvlm_ft.data.record import Record
from cogvlm_ft.grounding.targets import Box, Turn
from cogvlm_ft.settings import AugmentConfig, DataConfig


@dataclass(frozen=True)
class Colours:
    """Factors of brightness, contrast and saturation, 1 = unchanged; `hue` is a rotation of the colour circle.

    hue: 0 = unchanged, 0.5 = the complementary colour.
    """

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0

    def apply(self, image: Image.Image) -> Image.Image:
        """Return the RGB image in these colours, bit-identical if nothing changes."""
        for enhance, factor in (
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Color, self.saturation),
        ):
            if factor != 1:
                image = enhance(image).enhance(factor)
        steps = round(self.hue * 256)
        if steps:
            hue, saturation, value = image.convert("HSV").split()
            hue = hue.point([(level + steps) % 256 for level in range(256)])
            image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
        return image


def augments(settings: AugmentConfig) -> bool:
    """Return False if every image is shown unchanged."""
    return any(value for name, value in vars(settings).items() if name != "min_crop")


def draft_side(data: DataConfig, image_size: int) -> int | None:
    """Return the fewest pixels per side to which a training JPEG may be decoded; None decodes it in full.

    The smallest crop then still fills the model's input. Tiles are cut from photos in full.
    """
    if not data.jpeg_draft or data.tiles.side_px is not None:
        return None
    return math.ceil(image_size / (data.augment.min_crop if data.augment.crop else 1))


def choose_look(
    record: Record,
    turns: Sequence[Turn],
    settings: AugmentConfig,
    resize: str,
    *,
    seed: int,
    epoch: int,
    tile: Frame | None = None,
) -> tuple[Frame, Colours]:
    """Choose the frame and the colours in which an image is shown.

    A pure function of (seed, epoch, key) and of the texts about the image.

    turns: those about the whole image. If the record has turns of its own (`record.turns`), the image is neither
        cropped nor mirrored, because their texts may refer to any place in it.
    tile: the part of the image that is shown, which is not cropped further.
    """
    rng = random.Random(f"look:{seed}:{epoch}:{record.key}")
    crops, flips, log_fraction = rng.random() < settings.crop, rng.random() < settings.flip, rng.random()
    changes = [rng.uniform(-1, 1) for _ in range(4)]
    texts = _texts(record, turns)
    frame = whole_frame(record, "squash") if tile is None else tile
    if crops and tile is None and not record.turns and not any(map(mentions_place, texts)):
        boxes = [box for target in record.targets for box in target.boxes_xyxy]
        frame = crop(frame, boxes, settings.min_crop**log_fraction, rng)
    if flips and not record.turns and not any(map(mentions_side, texts)):
        frame = replace(frame, mirrored=True)
    hue = 0.0 if any(map(mentions_colour, texts)) else settings.hue
    colours = Colours(
        brightness=1 + changes[0] * settings.brightness,
        contrast=1 + changes[1] * settings.contrast,
        saturation=1 + changes[2] * settings.saturation,
        hue=changes[3] * hue,
    )
    return fit(frame, resize), colours


def crop(frame: Frame, boxes: Sequence[Box], fraction: float, rng: random.Random) -> Frame:
    """Return a window at a random position with `fraction` of the image's width and height that contains all boxes.

    It grows by the same factor in both directions if the boxes need more, up to the whole image.
    """
    width, height = frame.photo_px
    x0, y0 = (min((box[i] for box in boxes), default=length) for i, length in enumerate(frame.photo_px))
    x1, y1 = (max((box[i] for box in boxes), default=0) for i in (2, 3))
    fraction = min(1.0, max(fraction, (x1 - x0) / width, (y1 - y0) / height))
    left, right = _span(x0, x1, fraction * width, width, rng)
    top, bottom = _span(y0, y1, fraction * height, height, rng)
    return replace(frame, window_px=(left, top, right, bottom))


def _span(low: float, high: float, length: float, whole: int, rng: random.Random) -> tuple[int, int]:
    """Return an interval of `length` within 0..`whole` that contains low..high, rounded outwards to the grid.

    If low > high, it may be anywhere.
    """
    first, last = max(0.0, high - length), max(0.0, min(low, whole - length))
    start = first + rng.random() * (last - first)
    end = max(start + length, high)
    return math.floor(start / GRID_PX) * GRID_PX, min(whole, math.ceil(end / GRID_PX) * GRID_PX)


def _texts(record: Record, turns: Sequence[Turn]) -> list[str]:
    """Collect all texts about the image."""
    texts = [text for turn in turns for text in (turn.prompt, turn.answer)]
    texts += [text for turn in turns for pair in turn.history for text in pair]
    texts += [text for target in record.targets for text in (target.phrase, target.description or "")]
    texts += [words for target in record.targets for _, words in target.names]
    return texts
