"""An image as the model sees it, as a tensor."""

from __future__ import annotations

from torch import Tensor

from cogvlm_ft.data.frames import Frame
from cogvlm_ft.data.stored_photo import Photo
from cogvlm_ft.model.configuration import CogVLMConfig
from cogvlm_ft.model.preprocess import preprocess_image
from cogvlm_ft.settings import RESIZES


def model_input(photo: Photo, frame: Frame, image_size: int) -> Tensor:
    """Return float32[3, S, S]: what the model sees of a photo, as for `Frame.apply_image`.

    In training, `Look.draw` changes the colours too.
    """
    return preprocess_image(frame.apply_image(photo, image_size), image_size)


def resize_of(config: CogVLMConfig) -> str:
    """Return the way of resizing (one of RESIZES) the model was trained with: squash if its config.json has none."""
    return str(getattr(config, "image_resize", RESIZES[0]))
