"""The learning rate: linear warm-up, then a cosine. A pure function of the position, so no state needs saving."""

from __future__ import annotations

import math

from cogvlm_ft.settings import TrainConfig


def lr_at(step: float, num_steps: int, train: TrainConfig) -> float:
    """Return the learning rate of optimizer step `step` (from 0) out of `num_steps`.

    step: a fraction where earlier steps had another batch size.
    """
    num_warmup = math.ceil(train.warmup_fraction * num_steps)
    if step < num_warmup:
        return min(train.lr, train.lr * (step + 1) / num_warmup)
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return train.lr * (train.min_lr_ratio + (1 - train.min_lr_ratio) * cosine)
