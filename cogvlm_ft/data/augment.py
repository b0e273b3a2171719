"""How a training photo is shown this time: a part of it, mirrored, in other colours. Boxes and texts stay true."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageEnhance

from cogvlm_ft.data.mentions import mentions_colour, mentions_place, mentions_side
from cogvlm_ft.data.record import Record
from cogvlm_ft.data.transforms import GRID_PX, Frame, fit, whole_frame
from cogvlm_ft.grounding.targets import Box, Turn
from cogvlm_ft.settings import AugmentConfig, DataConfig


@dataclass(frozen=True)
class Colours:
    """Factors, 1 = unchanged; hue: a turn of the colour circle, 0 = unchanged, 0.5 = the opposite colour."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0

    def apply(self, image: Image.Image) -> Image.Image:
        """The RGB picture in these colours; the very same pixels if nothing changes."""
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
    """False if every photo is shown as it is."""
    return any(value for name, value in vars(settings).items() if name != "min_crop")


def draft_side(data: DataConfig, image_size: int) -> int | None:
    """The fewest pixels a side of a training photo may be decoded to, so that the smallest crop still fills the model's
    input; None: decode all."""
    if not data.jpeg_draft:
        return None
    return math.ceil(image_size / (data.augment.min_crop if data.augment.crop else 1))


def choose_look(
    record: Record, turns: Sequence[Turn], settings: AugmentConfig, resize: str, *, seed: int, epoch: int
) -> tuple[Frame, Colours]:
    """How the photo is shown, depending on (seed, epoch, key) and on the texts about it only.

    turns: those of the whole photo. With turns of the user's own the picture stays whole, for their texts may speak of
    any place in it.
    """
    rng = random.Random(f"look:{seed}:{epoch}:{record.key}")
    crops, flips, log_share = rng.random() < settings.crop, rng.random() < settings.flip, rng.random()
    changes = [rng.uniform(-1, 1) for _ in range(4)]
    texts = _texts(record, turns)
    frame = whole_frame(record, "squash")
    if crops and not record.turns and not any(map(mentions_place, texts)):
        boxes = [box for target in record.targets for box in target.boxes_xyxy]
        frame = crop(frame, boxes, settings.min_crop**log_share, rng)
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


def crop(frame: Frame, boxes: Sequence[Box], share: float, rng: random.Random) -> Frame:
    """A part of the whole photo, `share` of its width and height, somewhere around all of the boxes.

    Larger if they need it, by the same factor both ways; in the end all of the photo.
    """
    width, height = frame.photo_px
    x0, y0 = (min((box[i] for box in boxes), default=length) for i, length in enumerate(frame.photo_px))
    x1, y1 = (max((box[i] for box in boxes), default=0) for i in (2, 3))
    share = min(1.0, max(share, (x1 - x0) / width, (y1 - y0) / height))
    left, right = _span(x0, x1, share * width, width, rng)
    top, bottom = _span(y0, y1, share * height, height, rng)
    return replace(frame, window_px=(left, top, right, bottom))


def _span(low: float, high: float, length: float, whole: int, rng: random.Random) -> tuple[int, int]:
    """`length` of 0..`whole` with low..high in it (anywhere, if low > high); rounded outwards to the grid."""
    first, last = max(0.0, high - length), max(0.0, min(low, whole - length))
    start = first + rng.random() * (last - first)
    end = max(start + length, high)
    return math.floor(start / GRID_PX) * GRID_PX, min(whole, math.ceil(end / GRID_PX) * GRID_PX)


def _texts(record: Record, turns: Sequence[Turn]) -> list[str]:
    """Everything that is said about the photo."""
    texts = [text for turn in turns for text in (turn.prompt, turn.answer)]
    texts += [text for turn in turns for pair in turn.history for text in pair]
    texts += [text for target in record.targets for text in (target.phrase, target.description or "")]
    return texts
