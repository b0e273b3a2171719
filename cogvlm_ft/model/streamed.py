"""A model that is run without ever being held: each module reads its parameters just before it runs and drops them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import initialization

from cogvlm_ft.model.cogvlm import IGNORE_INDEX, CogVLMForCausalLM
from cogvlm_ft.model.configuration import CogVLMConfig
from cogvlm_ft.model.loading import Weight, read_whole


def streamed_logits(
    config: CogVLMConfig,
    weights: Mapping[str, Weight],
    inputs: Mapping[str, Tensor],
    labels: Tensor,
    label: str,
) -> Tensor:
    """float32[n, V], what the model thinks of each labelled token of i64[B, L] from the true tokens before it; on CPU,
    in float32 whatever the dtype of the weights.

    inputs: input_ids, pixel_values, position_ids and block_ids, as in training. Memory holds the largest module (for
    17B, the embeddings of 0.5 GB) and the activations of all rows, since each weight is read once. label: of the bar.
    """
    model = meta_model(config)
    owners = {name: module for name, module in model.named_modules() if _own_parameters(module)}
    with tqdm(total=len(owners), desc=label, unit="module", disable=None) as bar, torch.no_grad():
        for name, module in owners.items():
            _Streamed(name, module, weights, bar)
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        return model.lm_head(hidden[:, :-1][labels[:, 1:] != IGNORE_INDEX]).float()


def meta_model(config: CogVLMConfig) -> CogVLMForCausalLM:
    """Names and shapes, without memory."""
    with initialization.no_init_weights(), torch.device("meta"):
        return CogVLMForCausalLM(config).eval().requires_grad_(False)


class _Streamed:
    """Hooks on a module that fill its own parameters for as long as it runs. It works because a module that owns a
    parameter is the module that uses it."""

    def __init__(self, name: str, module: nn.Module, weights: Mapping[str, Weight], bar: tqdm) -> None:
        self._empty = _own_parameters(module)
        self._stored = {key: weights[f"{name}.{key}"] for key in self._empty}
        self._bar = bar
        module.register_forward_pre_hook(self._fill)
        module.register_forward_hook(self._drop)

    def _fill(self, module: nn.Module, arguments: Any) -> None:
        for key, stored in self._stored.items():
            setattr(module, key, nn.Parameter(read_whole(stored, torch.float32), requires_grad=False))

    def _drop(self, module: nn.Module, arguments: Any, output: Any) -> None:
        for key, parameter in self._empty.items():
            setattr(module, key, parameter)
        self._bar.update()


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False))
