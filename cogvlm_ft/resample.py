"""Resize an image to the model's square with the same pixels under every version of Pillow."""

from __future__ import annotations

from PIL import Image


def resize_square(image: Image.Image, size_px: int) -> Image.Image:
    """Return the image squashed to size_px x size_px by Pillow's bicubic on 8-bit values.

    Each of its two passes rounds and clips. Pillow 13 shrinks the height first where the image is taller than wide;
    Pillow 12 shrinks the width first, which differs by up to 15 of 255 in a small portrait image. This is Pillow 13's
    order.
    """
    if image.height > max(size_px, image.width):
        image = image.resize((image.width, size_px), Image.Resampling.BICUBIC)
    return image.resize((size_px, size_px), Image.Resampling.BICUBIC)
