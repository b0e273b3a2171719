"""Image preprocessing as in CogVLM's training."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cogvlm_ft.resample import resize_square

# CLIP's channel statistics.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess_image(image: Image.Image, image_size: int) -> Tensor:
    """Return float32[3, S, S], normalized.

    RGB (alpha dropped, EXIF orientation not applied), squashed to S x S by Pillow's bicubic on 8-bit values, scaled
    to 0..1.
    """
    square = resize_square(image.convert("RGB"), image_size)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous().float().div(255)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return pixels.sub_(mean).div_(std)
