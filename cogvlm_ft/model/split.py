"""A model whose layers are on several devices, one part after the other: for inference that one GPU cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cogvlm_ft.model.cogvlm import CogVLMForCausalLM
from cogvlm_ft.model.decoder import AttentionInputs


def split_layers(layer_bytes: Sequence[int], other_bytes: int, num_devices: int) -> list[int]:
    """Return the number of each layer's device, ascending, such that the fullest device holds as little as possible.

    other_bytes: what the first device holds besides layers.
    """
    low, high = max(other_bytes, *layer_bytes), other_bytes + sum(layer_bytes)
    while low < high:
        middle = (low + high) // 2
        if _filled(layer_bytes, other_bytes, middle)[-1] < num_devices:
            high = middle
        else:
            low = middle + 1
    return _filled(layer_bytes, other_bytes, low)


def _filled(layer_bytes: Sequence[int], other_bytes: int, limit: int) -> list[int]:
    """Return the device of each layer if every device is filled up to the limit, as many devices as that takes."""
    numbers, number, held = [], 0, other_bytes
    for size in layer_bytes:
        if held + size > limit:
            number, held = number + 1, 0
        numbers.append(number)
        held += size
    return numbers


def allocate_on(model: CogVLMForCausalLM, devices: Sequence[torch.device]) -> None:
    """Allocate a model of the meta device on devices, and let tensors follow its layers.

    The first device has everything but the layers of the language model; inputs and outputs are on it.
    """
    first, layers = devices[0], list(model.model.layers)
    if len(devices) == 1:
        model.to_empty(device=first)
        return
    sizes = [_num_bytes(layer) for layer in layers]
    numbers = split_layers(sizes, _num_bytes(model) - sum(sizes), len(devices))
    moved: dict[torch.device, tuple[AttentionInputs, AttentionInputs]] = {}
    for layer, number in zip(layers, numbers, strict=True):
        layer.to_empty(device=devices[number])
        layer.register_forward_pre_hook(_moving_to(devices[number], moved))
    for name, module in (*model.named_children(), *model.model.named_children()):
        if name not in ("model", "layers"):
            module.to_empty(device=first)
    model.model.norm.register_forward_pre_hook(lambda _, arguments: (arguments[0].to(first),))


def _num_bytes(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _moving_to(
    device: torch.device, moved: dict[torch.device, tuple[AttentionInputs, AttentionInputs]]
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """Return a hook that moves what a layer is given. moved: what all layers share in this pass, by device."""

    def move(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, shared = arguments
        if device not in moved or moved[device][0] is not shared:
            moved[device] = shared, _on(device, shared)
        return hidden.to(device), moved[device][1]

    return move


def _on(device: torch.device, value: Any) -> Any:
    """Return a value, with all tensors inside it on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: _on(device, getattr(value, each.name)) for each in fields(value)})
    return value
