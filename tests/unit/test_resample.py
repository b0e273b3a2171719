"""The model's square image under every version of Pillow: each pass rounds and clips, so that their order matters."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cogvlm_ft.resample import resize_square

BICUBIC = Image.Resampling.BICUBIC


@pytest.mark.parametrize(
    ("width", "height", "first"),
    [(37, 91, "height"), (60, 91, "height"), (91, 60, "width"), (91, 91, "width"), (20, 37, "width")],
)
def test_the_order_of_the_passes(width: int, height: int, first: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    between = {"height": (width, 56), "width": (56, height)}
    expected = {order: image.resize(size, BICUBIC).resize((56, 56), BICUBIC) for order, size in between.items()}
    assert resize_square(image, 56) == expected[first]
    assert expected["height"] != expected["width"]
