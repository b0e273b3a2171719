"""What the model sees is drawn without torch, with the pixels and texts of training."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from cogvlm_ft.data.frames import PADDING
from cogvlm_ft.data.look import build_look
from cogvlm_ft.data.record import Record
from cogvlm_ft.data.transforms import model_input
from cogvlm_ft.grounding.boxes import boxes_from_bins, parse_boxes
from cogvlm_ft.grounding.targets import Target
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model.preprocess import MEAN, preprocess_image
from cogvlm_ft.settings import AugmentConfig

ALL = AugmentConfig(crop=1, min_crop=0.4, flip=1, brightness=0.2, contrast=0.2, saturation=0.2)
SIDE = 98
RED = (250, 10, 10)


def test_padding_is_the_mean_of_the_model() -> None:
    assert tuple(round(mean * 255) for mean in MEAN) == PADDING


def test_the_picture_is_the_input_of_the_model_and_the_answer_fits_it() -> None:
    box = (60.0, 20.0, 160.0, 50.0)
    photo = Image.new("RGB", (320, 120), (20, 20, 120))
    photo.paste(RED, tuple(map(int, box)))
    record = Record("k", photo.size, "s", (Target("the block", "en", (box,)),), ())
    for resize in ("squash", "letterbox"):
        for augment in (AugmentConfig(), ALL):
            look = build_look(record, load_wording("box"), augment, resize, seed=3, epoch=1)
            seen = look.draw(photo, SIDE)
            assert seen.size == (SIDE, SIDE)
            if augment is not ALL:  # in evaluation
                assert torch.equal(model_input(photo, look.frame, SIDE), preprocess_image(seen, SIDE))
            red = np.argwhere(np.asarray(seen, dtype=int)[:, :, 0] > 130)  # (y, x)
            ((x0, y0, x1, y1),) = boxes_from_bins(parse_boxes(look.turns[0].answer) or [], (SIDE, SIDE))
            found = (*red.min(axis=0)[::-1], *(red.max(axis=0)[::-1] + 1))
            assert np.abs(np.array((x0, y0, x1, y1)) - found).max() <= 2
