"""Which parameters are trained, and how fast: frozen ones, learning rates of parts, the optimizer's groups."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.settings import Config, TrainConfig

logger = logging.getLogger(__name__)

VISION_LAYER = re.compile(r"model\.vision\.transformer\.layers\.(\d+)\.")
VISION_EMBEDDING = "model.vision.patch_embedding."


def freeze(model: nn.Module, config: Config) -> None:
    """Exclude the parameters from training that match `model.freeze`, or whose `train.lr_scale` is 0."""
    parameters = dict(model.named_parameters())
    for pattern in config.model.freeze:
        for name in _matching("model.freeze", pattern, parameters):
            parameters[name].requires_grad_(False)
    for name, scale in lr_scales(parameters, config.train).items():
        if scale == 0:
            parameters[name].requires_grad_(False)


def lr_scales(names: Iterable[str], train: TrainConfig) -> dict[str, float]:
    """Return the factor of the learning rate of each parameter.

    Of several patterns that match a name, the last counts. `train.vision_layer_decay` multiplies it: the last layer of
    the vision tower by the decay, the layer before by its square, and so on down to the patch embedding.
    """
    scales = dict.fromkeys(names, 1.0)
    for pattern, scale in train.lr_scale.items():
        for name in _matching("train.lr_scale", pattern, scales):
            scales[name] = float(scale)
    if train.vision_layer_decay == 1:
        return scales
    layers = {name: int(found[1]) for name in scales if (found := VISION_LAYER.match(name))}
    layers |= {name: -1 for name in scales if name.startswith(VISION_EMBEDDING)}
    num_layers = max(layers.values(), default=-1) + 1
    return {
        name: scale * train.vision_layer_decay ** (num_layers - layers[name]) if name in layers else scale
        for name, scale in scales.items()
    }


def _matching(key: str, pattern: str, names: Iterable[str]) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise ConfigError(
            f"{key}: found {pattern!r}, which matches no parameter; expected a pattern for names such as "
            f"{next(iter(names))}"
        )
    return found


def parameter_groups(model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    """Divide the trained parameters by their `lr_scale`, and these into two groups.

    Matrices have weight decay; norms and biases (one dimension) have none.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ConfigError(
            "model.freeze, train.lr_scale: found patterns that freeze all parameters; expected at least one to train"
        )
    scales = lr_scales(dict(model.named_parameters()), train)
    groups = []
    for scale in dict.fromkeys(scales[name] for name in trained):
        parameters = [parameter for name, parameter in trained.items() if scales[name] == scale]
        decayed = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) > 1]
        plain = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) <= 1]
        groups.append({"params": decayed, "weight_decay": train.weight_decay, "lr_scale": scale})
        groups.append({"params": plain, "weight_decay": 0.0, "lr_scale": scale})
    return [group for group in groups if group["params"]]


def log_groups(groups: list[dict[str, Any]]) -> None:
    """Log how many parameters have which factor, where they differ."""
    sizes: dict[float, int] = {}
    for group in groups:
        numel = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in group["params"])
        sizes[group["lr_scale"]] = sizes.get(group["lr_scale"], 0) + numel
    if sizes.keys() != {1.0}:
        listed = ", ".join(f"x {scale:.4g}: {numel:,} parameters" for scale, numel in sorted(sizes.items()))
        logger.info("learning rates: %s", listed)


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set the learning rate of every group: `lr` times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def group_rates(optimizer: Any, lr: float) -> dict[str, float]:
    """Return the rates of the groups whose factor is not 1, such as {"lr/x0.1": 5e-06}."""
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    return {f"lr/x{scale:.4g}": lr * scale for scale in sorted(scales - {1.0})}


def settings_of_rates(train: TrainConfig) -> list[list[Any]]:
    """Return the settings that divide the optimizer into groups, as JSON has them; empty where all rates are equal."""
    decay = train.vision_layer_decay
    return [[pattern, scale] for pattern, scale in train.lr_scale.items()] + (
        [] if decay == 1 else [["vision_layer_decay", decay]]
    )
