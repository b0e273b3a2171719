"""Settings of a review."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.settings import RESIZES, AugmentConfig, DataConfig
from cogvlm_ft.shards.reviewing.statistics import WEIGHTS_SIZE

EXAMPLE_AUGMENT = AugmentConfig(crop=1.0, flip=1.0, brightness=0.2, contrast=0.2, saturation=0.2)
"""Augmentation that is shown as an example if the user sets none."""


@dataclass(frozen=True)
class ReviewSettings:
    """Settings of the training run, and limits of the page.

    image_size: of training, in px. weights_size: of the weights that training starts from.
    wording, resize, augment: as `data.wording`, `data.resize`, `data.augment`; without augment: EXAMPLE_AUGMENT.
    max_pictures: of suspects. max_listed: suspects on the page without a picture.
    """

    image_size: int = WEIGHTS_SIZE
    weights_size: int = WEIGHTS_SIZE
    wording: str = str(DataConfig.wording)
    resize: str = RESIZES[0]
    augment: AugmentConfig | None = None
    max_pictures: int = 200
    max_listed: int = 2000
    num_workers: int = 1


def parse_augment(stated: Sequence[str]) -> AugmentConfig:
    """Parse NAME=VALUE texts, as in `data.augment`. Raises ConfigError that names the one that is wrong."""
    rules = {field.name: field.metadata["rules"] for field in fields(AugmentConfig)}
    values: dict[str, float] = {}
    for text in stated:
        name, _, number = text.removeprefix("data.augment.").partition("=")
        if name not in rules:
            raise ConfigError(f"--augment {text}: unknown name; expected one of {', '.join(rules)}, such as crop=0.5")
        least, most = rules[name].least, rules[name].most
        try:
            values[name] = float(number)
        except ValueError:
            values[name] = math.nan
        if not least <= values[name] <= most:
            raise ConfigError(f"--augment {text}: found {number!r}; expected a number from {least:g} to {most:g}")
    return AugmentConfig(**values)
