"""Which rectangle of a photo the model sees. One value moves the photo and its boxes there, and answered boxes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from PIL import Image
from torch import Tensor

from cogvlm_ft.data.record import BadSampleError, Record
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.model.configuration import CogVLMConfig
from cogvlm_ft.model.preprocess import MEAN, preprocess_image
from cogvlm_ft.settings import RESIZES

GRID_PX = 8
"""Frames lie on this grid, or on an edge of the photo: whole pixels also of a JPEG decoded at 1/2, 1/4 or 1/8."""

_PADDING = tuple(round(mean * 255) for mean in MEAN)  # what is nearly zero for the model


@dataclass(frozen=True)
class Frame:
    """A rectangle of a photo that is squashed into the model's square.

    Boxes in the frame keep the size of a photo's pixel: they are only moved and mirrored. Box text is made from them
    with `size_px`, and an IoU is the same there as in the photo.

    photo_px: (width, height). window_px: (x0, y0, x1, y1) in the photo; beyond the photo's edges there is grey.
    mirrored: left and right are exchanged.
    """

    photo_px: tuple[int, int]
    window_px: tuple[int, int, int, int]
    mirrored: bool = False

    @property
    def size_px(self) -> tuple[int, int]:
        """(width, height) of the frame."""
        x0, y0, x1, y1 = self.window_px
        return x1 - x0, y1 - y0

    @property
    def is_whole_photo(self) -> bool:
        """True if nothing moves."""
        return self.window_px == (0, 0, *self.photo_px) and not self.mirrored

    def apply_image(self, image: Image.Image, image_size: int) -> Image.Image:
        """What the model sees, image_size x image_size, of the photo (RGB) or of its exact half, quarter or eighth.

        For the whole photo these are the pixels of `preprocess_image`, which leaves them as they are.
        """
        shrink = self.photo_px[0] // image.width
        x0, y0, x1, y1 = (edge // shrink for edge in self.window_px)
        if (x0, y0, x1, y1) != (0, 0, *image.size):
            framed = Image.new("RGB", (x1 - x0, y1 - y0), _PADDING)
            framed.paste(image, (-x0, -y0))
            image = framed
        if self.mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image.resize((image_size, image_size), Image.Resampling.BICUBIC)

    def apply_boxes(self, boxes: Iterable[Box]) -> tuple[Box, ...]:
        """From pixels of the photo to pixels of the frame."""
        left, top, right, _ = self.window_px
        if self.mirrored:
            return tuple((right - x1, y0 - top, right - x0, y1 - top) for x0, y0, x1, y1 in boxes)
        return tuple((x0 - left, y0 - top, x1 - left, y1 - top) for x0, y0, x1, y1 in boxes)

    def invert_boxes(self, boxes: Iterable[Box]) -> tuple[Box, ...]:
        """From pixels of the frame to pixels of the photo; may leave it where there was grey."""
        left, top, right, _ = self.window_px
        if self.mirrored:
            return tuple((right - x1, y0 + top, right - x0, y1 + top) for x0, y0, x1, y1 in boxes)
        return tuple((x0 + left, y0 + top, x1 + left, y1 + top) for x0, y0, x1, y1 in boxes)


def model_input(
    image: Image.Image, frame: Frame, image_size: int, recolour: Callable[[Image.Image], Image.Image] | None = None
) -> Tensor:
    """Return float32[3, S, S]: what the model sees of a photo (RGB, or its exact half, quarter or eighth) in a frame.

    recolour: changes the S x S image before it is normalised.
    """
    seen = frame.apply_image(image, image_size)
    return preprocess_image(recolour(seen) if recolour else seen, image_size)


def resize_of(config: CogVLMConfig) -> str:
    """One of RESIZES: what this model was trained with. Squash, if its config.json says nothing."""
    return str(getattr(config, "image_resize", RESIZES[0]))


def whole_frame(record: Record, resize: str) -> Frame:
    """All of the photo that the reader found for this record."""
    assert record.image_size_px is not None
    return photo_frame(record.image_size_px, resize)


def photo_frame(photo_px: tuple[int, int], resize: str) -> Frame:
    """The whole photo: as it is ("squash"), or in the middle of a square ("letterbox")."""
    return fit(Frame(photo_px, (0, 0, *photo_px)), resize)


def fit(frame: Frame, resize: str) -> Frame:
    """The same part of the photo, for "letterbox" with grey on both sides of it that makes it a square."""
    assert resize in RESIZES, resize
    if resize == "squash":
        return frame
    x0, y0, _, _ = frame.window_px
    width, height = frame.size_px
    side = max(width, height)
    left, top = (x0 - _before(side - width), y0 - _before(side - height))
    return replace(frame, window_px=(left, top, left + side, top + side))


def _before(padding_px: int) -> int:
    """Half of the padding, on the grid."""
    return padding_px // (2 * GRID_PX) * GRID_PX


def move_record(record: Record, frame: Frame) -> Record:
    """The record of what is in the frame.

    Raises BadSampleError (boxes_in_turns) if something moves and the user's own turns hold boxes as text.
    """
    if frame.is_whole_photo:
        return record
    for turn in record.turns:
        for text in (turn.prompt, turn.answer, *(part for pair in turn.history for part in pair)):
            if "[[" in text:
                detail = f"{text!r:.120} holds boxes of the whole photo: such turns need data.resize=squash"
                raise BadSampleError(record.key, "boxes_in_turns", detail)
    targets = tuple(replace(target, boxes_xyxy=frame.apply_boxes(target.boxes_xyxy)) for target in record.targets)
    return replace(record, image_size_px=frame.size_px, targets=targets)
