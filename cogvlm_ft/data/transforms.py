"""An image as the model sees it, as a tensor."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image
from torch import Tensor

from cogvlm_ft.data.frames import Frame
from cogvlm_ft.model.configuration import CogVLMConfig
from cogvlm_ft.model.preprocess import preprocess_image
from cogvlm_ft.settings import RESIZES


def model_input(
    image: Image.Image, frame: Frame, image_size: int, recolour: Callable[[Image.Image], Image.Image] | None = None
) -> Tensor:
    """Return float32[3, S, S]: what the model sees of an image (RGB, or its exact half, quarter or eighth) in a frame.

    recolour: changes the S x S image before it is normalised.
    """
    seen = frame.apply_image(image, image_size)
    return preprocess_image(recolour(seen) if recolour else seen, image_size)


def resize_of(config: CogVLMConfig) -> str:
    """Return the way of resizing (one of RESIZES) the model was trained with: squash if its config.json has none."""
    return str(getattr(config, "image_resize", RESIZES[0]))
