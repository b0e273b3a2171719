"""Shrink large images when shards are built: less to store, transfer and decode.

Boxes are scaled exactly like the image, in floating point. Box text changes only for edges within the last pixel of the
right or lower border, where the reference clamps: that pixel is larger now. `max_shift_px` returns by how much. The
pixels are re-encoded as JPEG.
"""

from __future__ import annotations

import io
from dataclasses import replace

from PIL import Image

from cogvlm_ft.data.reader import decode_image
from cogvlm_ft.grounding.boxes import NUM_BINS
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.packing.checks import CheckedSample

QUALITY = 90


def shrink_sample(sample: CheckedSample, max_side: int, quality: int = QUALITY) -> CheckedSample:
    """Return the sample with an image of at most `max_side` pixels a side; unchanged, bytes too, if it is no larger.

    A shrunken photo is an upright JPEG without EXIF data. Raises BadSampleError if it cannot be decoded.
    """
    record = sample.record
    assert record.image_size_px is not None, "a checked sample knows its size"
    width, height = record.image_size_px
    if max(width, height) <= max_side:
        return sample
    scale = max_side / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = decode_image(sample.image, record.key, width * height, upright=record.upright)
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality, subsampling=0)
    factors = size[0] / width, size[1] / height
    targets = tuple(
        replace(target, boxes_xyxy=tuple(_scaled(box, factors) for box in target.boxes_xyxy))
        for target in record.targets
    )
    record = replace(record, image_size_px=size, targets=targets, upright=False)
    return CheckedSample(record, "jpg", buffer.getvalue())


def max_shift_px(side_px: int, image_size: int) -> float:
    """Return how far an edge can move in the model's input, in pixels: one pixel of the smaller image, and one bin.

    side_px: size of the smaller image in that direction.
    """
    return image_size * (1 / side_px + 1 / NUM_BINS)


def _scaled(box: Box, factors: tuple[float, float]) -> Box:
    x0, y0, x1, y1 = box
    return x0 * factors[0], y0 * factors[1], x1 * factors[0], y1 * factors[1]
