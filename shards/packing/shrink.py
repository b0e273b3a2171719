"""Large photos made smaller when shards are built: less to store, to send and to decode.

What it costs: boxes are scaled by exactly what the photo is scaled by, in floating point. So box text changes only for
edges within the last pixel of the right or lower border, where the reference clamps: that pixel is larger now.
`max_shift_px` says by how much. The pixels are re-encoded as JPEG.
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
    """The sample with a photo of at most `max_side` pixels a side; the same if it is no larger, bytes and all.

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
    """How far an edge can move in the model's input, pixels, where the smaller photo has `side_px` in that direction:
    its last pixel, and one bin of the box text for rounding."""
    return image_size * (1 / side_px + 1 / NUM_BINS)


def _scaled(box: Box, factors: tuple[float, float]) -> Box:
    x0, y0, x1, y1 = box
    return x0 * factors[0], y0 * factors[1], x1 * factors[0], y1 * factors[1]
