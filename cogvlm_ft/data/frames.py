"""The rectangle of an image that the model sees.

A `Frame` maps the image and its boxes there, and predicted boxes back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from PIL import Image

from cogvlm_ft.data.record import BadSampleError, Record
from cogvlm_ft.data.stored_photo import Photo, StoredPhoto
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.resample import resize_square
from cogvlm_ft.settings import RESIZES

GRID_PX = 8
"""Frames are aligned to this grid or to an edge of the image: whole pixels also of a JPEG at 1/2, 1/4 or 1/8 size."""

PADDING = (123, 117, 104)
"""Grey beyond the edges of an image, in RGB: CLIP's channel means, so nearly zero after normalisation."""


@dataclass(frozen=True)
class Frame:
    """A rectangle of an image that is squashed into the model's square input.

    Boxes in the frame keep the image's pixel size: they are only moved and mirrored. Box text is written relative to
    `size_px`, and an IoU is the same as in the image.

    photo_px: (width, height). window_px: (x0, y0, x1, y1) in the image; grey beyond its edges.
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
        """Whether the frame is the unchanged image."""
        return self.window_px == (0, 0, *self.photo_px) and not self.mirrored

    def apply_image(self, photo: Photo, image_size: int) -> Image.Image:
        """Return the S x S image that the model sees, S = image_size.

        photo: the whole image (RGB), or exactly a half, a quarter or an eighth of it, or a photo in tiles. If the frame
        is the unchanged image, the result has the pixels of `preprocess_image`, which does not resize it again.
        """
        image, shown = photo.show(self.window_px) if isinstance(photo, StoredPhoto) else (photo, (0, 0, *self.photo_px))
        left, top, right, bottom = shown
        x0, x1 = ((x - left) * image.width // (right - left) for x in self.window_px[::2])
        y0, y1 = ((y - top) * image.height // (bottom - top) for y in self.window_px[1::2])
        if (x0, y0, x1, y1) != (0, 0, *image.size):
            framed = Image.new("RGB", (x1 - x0, y1 - y0), PADDING)
            framed.paste(image, (-x0, -y0))
            image = framed
        if self.mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return resize_square(image, image_size)

    def apply_boxes(self, boxes: Iterable[Box]) -> tuple[Box, ...]:
        """Map boxes from pixels of the image to pixels of the frame."""
        left, top, right, _ = self.window_px
        if self.mirrored:
            return tuple((right - x1, y0 - top, right - x0, y1 - top) for x0, y0, x1, y1 in boxes)
        return tuple((x0 - left, y0 - top, x1 - left, y1 - top) for x0, y0, x1, y1 in boxes)

    def invert_boxes(self, boxes: Iterable[Box]) -> tuple[Box, ...]:
        """Map boxes from pixels of the frame to pixels of the image; they may exceed it where the frame is grey."""
        left, top, right, _ = self.window_px
        if self.mirrored:
            return tuple((right - x1, y0 + top, right - x0, y1 + top) for x0, y0, x1, y1 in boxes)
        return tuple((x0 + left, y0 + top, x1 + left, y1 + top) for x0, y0, x1, y1 in boxes)


def whole_frame(record: Record, resize: str) -> Frame:
    """Return the frame of the whole image of a record whose image size is known."""
    assert record.image_size_px is not None
    return photo_frame(record.image_size_px, resize)


def photo_frame(photo_px: tuple[int, int], resize: str) -> Frame:
    """Return the frame of the whole image: itself ("squash"), or centred in a square ("letterbox")."""
    return fit(Frame(photo_px, (0, 0, *photo_px)), resize)


def fit(frame: Frame, resize: str) -> Frame:
    """Return the frame itself ("squash"), or padded with grey on both sides to a square ("letterbox")."""
    assert resize in RESIZES, resize
    if resize == "squash":
        return frame
    x0, y0, _, _ = frame.window_px
    width, height = frame.size_px
    side = max(width, height)
    left, top = (x0 - _before(side - width), y0 - _before(side - height))
    return replace(frame, window_px=(left, top, left + side, top + side))


def _before(padding_px: int) -> int:
    """Return half of the padding, rounded down to the grid."""
    return padding_px // (2 * GRID_PX) * GRID_PX


def move_record(record: Record, frame: Frame) -> Record:
    """Return the record with its boxes in pixels of the frame.

    Raises BadSampleError (boxes_in_turns) if boxes move and turns of the record hold boxes as text.
    """
    if frame.is_whole_photo:
        return record
    for turn in record.turns:
        for text in (turn.prompt, turn.answer, *(part for pair in turn.history for part in pair)):
            if "[[" in text:
                detail = f"turns: found {text!r:.120}, with boxes in the whole image; expected data.resize=squash"
                raise BadSampleError(record.key, "boxes_in_turns", detail)
    targets = tuple(replace(target, boxes_xyxy=frame.apply_boxes(target.boxes_xyxy)) for target in record.targets)
    return replace(record, image_size_px=frame.size_px, targets=targets)
