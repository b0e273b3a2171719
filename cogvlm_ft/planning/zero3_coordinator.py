"""How many parameters ZeRO-3 holds gathered at once: the rules of DeepSpeed's coordinator, played through on sizes.

From deepspeed/runtime/zero/partitioned_param_coordinator.py, in its steady state (from the third pass on): a module's
parameters are fetched before it runs; then the next ones of the pass, until stage3_prefetch_bucket_size elements are on
their way or stage3_max_live_parameters are there; after the module ran they are released, unless they are used again
within stage3_max_reuse_distance elements.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cogvlm_ft.model import CogVLMForCausalLM
from cogvlm_ft.planning.activations import AsInTraining


@dataclass(frozen=True)
class GatherRules:
    """Elements, from a DeepSpeed JSON's zero_optimization."""

    prefetch: int = 50_000_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000
    persistence: int = 100_000
    leaf_classes: tuple[str, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class Gathered:
    """Elements. peak: gathered at once, without the persistent ones; persistent: small parameters that always are.
    largest_fetch: of one message; total: of all messages of a forward and a backward pass."""

    peak: int
    persistent: int
    largest_fetch: int
    total: int


def module_order(model: CogVLMForCausalLM, rules: GatherRules, *, backward: bool = True) -> list[list[nn.Parameter]]:
    """The parameters of the modules in the order in which a pass calls them: forward, then backward.

    A layer that recomputes runs forward once more before its backward pass.
    """
    forward: list[tuple[nn.Module, nn.Module]] = []  # (module, the layer that it is part of)
    layers = [*model.model.vision.transformer.layers, *model.model.layers]
    owner = {id(part): layer for layer in layers for part in layer.modules()}
    leaves = {id(module) for module in model.modules() if _is_leaf(module, rules)}
    inside = {id(part) for module in model.modules() if id(module) in leaves for part in module.modules()} - leaves
    hooks = []
    for module in model.modules():
        if id(module) not in inside and any(True for _ in module.parameters(recurse=id(module) in leaves)):
            step = (module, owner.get(id(module), module))
            hooks.append(module.register_forward_pre_hook(lambda *_, step=step: forward.append(step)))
    _run_on_meta(model)
    for hook in hooks:
        hook.remove()

    def parameters(steps: Sequence[tuple[nn.Module, nn.Module]]) -> list[list[nn.Parameter]]:
        return [list(module.parameters(recurse=id(module) in leaves)) for module, _ in steps]

    order = parameters(forward)
    rest = list(forward) if backward else []
    while rest:
        layer = rest[-1][1]
        part = [rest.pop()]
        while rest and rest[-1][1] is layer:
            part.append(rest.pop())
        if getattr(layer, "gradient_checkpointing", False):
            order += parameters(part[::-1])
        order += parameters(part)
    return order


def _is_leaf(module: nn.Module, rules: GatherRules) -> bool:
    kind = type(module)
    return bool({kind.__name__, f"{kind.__module__}.{kind.__qualname__}"} & set(rules.leaf_classes))


def _run_on_meta(model: CogVLMForCausalLM) -> None:
    """One pass over shapes, without gradients and so without recomputing."""
    config = model.config
    with torch.device("meta"), torch.no_grad(), AsInTraining():
        ids = torch.zeros(1, config.num_patches + 4, dtype=torch.long)
        pixels = torch.zeros(1, config.vision["in_channels"], config.image_size, config.image_size)
        model(input_ids=ids, pixel_values=pixels, position_ids=ids, block_ids=ids.int())


def play(order: Sequence[Sequence[nn.Parameter]], rules: GatherRules) -> Gathered:
    """What is gathered while the modules of `order` run one after the other."""
    persistent = {p for step in order for p in step if p.numel() <= rules.persistence}
    queue = deque((p, number) for number, step in enumerate(order) for p in step)
    fetched_for: dict[Any, int] = {}
    available: set[nn.Parameter] = set()
    live = peak = largest = total = 0
    for number, step in enumerate(order):
        needed = set(step)
        fetch = [p for p in needed if p not in available and p not in persistent]
        unread = {p for p in needed if fetched_for.get(p, -1) < number}
        while unread:
            parameter, used_at = queue.popleft()
            fetched_for[parameter] = used_at
            unread.discard(parameter)
        ahead: set[nn.Parameter] = set()
        numel_ahead, live_now = 0, live + _numel(fetch)
        room = min(rules.max_live - live_now, rules.prefetch)
        while queue and numel_ahead < room:
            parameter, used_at = queue.popleft()
            fetched_for[parameter] = max(fetched_for.get(parameter, -1), used_at)
            if parameter not in available and parameter not in needed | persistent | ahead:
                ahead.add(parameter)
                numel_ahead += parameter.numel()
        available |= {*fetch, *ahead}
        live = live_now + numel_ahead
        peak, total = max(peak, live), total + _numel(fetch) + numel_ahead
        largest = max(largest, _numel(fetch), numel_ahead)
        for parameter in _released(step, order, number + 1, fetched_for, rules) & available:
            available.discard(parameter)
            live -= parameter.numel()
    return Gathered(peak, _numel(persistent), largest, total)


def _released(
    step: Sequence[nn.Parameter],
    order: Sequence[Sequence[nn.Parameter]],
    following: int,
    fetched_for: dict[Any, int],
    rules: GatherRules,
) -> set[nn.Parameter]:
    """Of the parameters of a module that has run, those that nothing within reach uses again."""
    released = {p for p in step if fetched_for.get(p, -1) <= following}
    traversed = 0
    for later in order[following:]:
        if traversed >= rules.max_reuse or not released:
            break
        released -= set(later)
        traversed += _numel(later)
    return released


def _numel(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)
