"""Simulate how many parameters ZeRO-3 holds gathered at once, by the rules of DeepSpeed's parameter coordinator.

The rules are those of deepspeed/runtime/zero/partitioned_param_coordinator.py after its third pass, when it knows the
order of the modules: the parameters of a module are gathered before it runs (`fetch_sub_module`), then parameters of
the following modules are prefetched, and after the module those are released that are not used again soon
(`release_sub_module`).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import nn

from cogvlm_ft.model import CogVLMForCausalLM
from cogvlm_ft.planning.activations import AsInTraining


@dataclass(frozen=True)
class GatherRules:
    """Limits in elements, from zero_optimization of a DeepSpeed JSON.

    prefetch: stage3_prefetch_bucket_size; max_live: stage3_max_live_parameters; max_reuse: stage3_max_reuse_distance;
    persistence: stage3_param_persistence_threshold; leaf_classes: modules that are gathered as one.
    """

    prefetch: int = 50_000_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000
    persistence: int = 100_000
    leaf_classes: tuple[str, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class Gathered:
    """Result of a simulation, in elements.

    peak: gathered at once, without the persistent ones; persistent: small parameters that are never released;
    largest_fetch: of one message; total: of all messages of a forward and a backward pass.
    """

    peak: int
    persistent: int
    largest_fetch: int
    total: int


class _Call(NamedTuple):
    """A module that runs, and the layer that it is part of (the module itself outside layers)."""

    module: nn.Module
    layer: nn.Module


def module_order(model: CogVLMForCausalLM, rules: GatherRules, *, backward: bool = True) -> list[list[nn.Parameter]]:
    """Return the parameters of the modules in the order in which they run: forward, then backward."""
    parameters = _fetched_together(model, rules)
    calls = _forward_calls(model, list(parameters))
    if backward:
        calls += _backward_calls(calls)
    return [parameters[call.module] for call in calls]


def _fetched_together(model: nn.Module, rules: GatherRules) -> dict[nn.Module, list[nn.Parameter]]:
    """Return the modules that gather parameters: a leaf module gathers all below it, any other module its own."""
    leaves = {module for module in model.modules() if _is_leaf(module, rules)}
    inside_leaves = {part for leaf in leaves for part in leaf.modules()} - leaves
    fetched = {
        module: list(module.parameters(recurse=module in leaves))
        for module in model.modules()
        if module not in inside_leaves
    }
    return {module: parameters for module, parameters in fetched.items() if parameters}


def _is_leaf(module: nn.Module, rules: GatherRules) -> bool:
    kind = type(module)
    return bool({kind.__name__, f"{kind.__module__}.{kind.__qualname__}"} & set(rules.leaf_classes))


def _forward_calls(model: CogVLMForCausalLM, modules: Iterable[nn.Module]) -> list[_Call]:
    """Return the calls of these modules in a forward pass: what the first layer of a tower calls, all of it call."""
    towers = [list(tower.layers) for tower in _towers(model)]
    tower_of = {part: tower for tower in towers for part in tower[0].modules()}
    calls: list[_Call] = []
    for tower, group in groupby(_called_with_one_layer(model, modules), key=tower_of.get):
        in_first = list(group)
        if tower is None:
            calls += [_Call(module, module) for module in in_first]
            continue
        for layer in tower:
            same_part = dict(zip(tower[0].modules(), layer.modules(), strict=True))
            calls += [_Call(same_part[module], layer) for module in in_first]
    return calls


def _called_with_one_layer(model: CogVLMForCausalLM, modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Run a forward pass on shapes through one layer of each tower, and record in which order it calls the modules."""
    called: list[nn.Module] = []
    hooks = [module.register_forward_pre_hook(lambda module, _: called.append(module)) for module in modules]
    towers = [(tower, tower.layers) for tower in _towers(model)]
    try:
        for tower, layers in towers:
            tower.layers = layers[:1]
        _run_on_meta(model)
    finally:
        for tower, layers in towers:
            tower.layers = layers
        for hook in hooks:
            hook.remove()
    return called


def _towers(model: CogVLMForCausalLM) -> list[Any]:
    """Return the two modules that hold `layers`."""
    return [model.model.vision.transformer, model.model]


def _run_on_meta(model: CogVLMForCausalLM) -> None:
    """Run one pass on shapes, without gradients and therefore without recomputation."""
    config = model.config
    with torch.device("meta"), torch.no_grad(), AsInTraining():
        ids = torch.zeros(1, config.num_patches + 4, dtype=torch.long)
        pixels = torch.zeros(1, config.vision["in_channels"], config.image_size, config.image_size)
        model(input_ids=ids, pixel_values=pixels, position_ids=ids, block_ids=ids.int())


def _backward_calls(forward: Sequence[_Call]) -> list[_Call]:
    """Reverse the forward pass. A layer with gradient checkpointing runs forward again before its backward pass."""
    calls: list[_Call] = []
    for _, group in groupby(reversed(forward), key=lambda call: id(call.layer)):
        backward = list(group)
        if getattr(backward[0].layer, "gradient_checkpointing", False):
            calls += backward[::-1]
        calls += backward
    return calls


def simulate(order: Sequence[Sequence[nn.Parameter]], rules: GatherRules) -> Gathered:
    """Count what is gathered while the modules of `order` run one after the other."""
    coordinator = _Coordinator(order, rules)
    peak = largest = total = 0
    for step in range(len(order)):
        fetched = coordinator.fetch(step)
        prefetched = coordinator.prefetch()
        peak = max(peak, coordinator.num_live)
        largest = max(largest, fetched, prefetched)
        total += fetched + prefetched
        coordinator.release(step)
    return Gathered(peak, _numel(coordinator.persistent), largest, total)


class _Use(NamedTuple):
    """A use of a parameter by the module that runs at `step`."""

    parameter: nn.Parameter
    step: int


class _Coordinator:
    """The state of DeepSpeed's PartitionedParameterCoordinator that decides what is gathered.

    persistent: parameters that are gathered once and never released. num_live: elements gathered now, without these.
    """

    def __init__(self, order: Sequence[Sequence[nn.Parameter]], rules: GatherRules) -> None:
        self._order, self._rules = order, rules
        self.persistent = {p for module in order for p in module if p.numel() <= rules.persistence}
        self.num_live = 0
        self._available: set[nn.Parameter] = set()
        # __param_queue: the uses that are still to come, in the order of the pass.
        self._queue = deque(_Use(parameter, step) for step, module in enumerate(order) for parameter in module)
        # __most_recent_step_id_param_fetched_for: the last step for which a parameter has left the queue.
        self._fetched_for: dict[nn.Parameter, int] = defaultdict(lambda: -1)

    def fetch(self, step: int) -> int:
        """Gather what the module at `step` lacks; return its elements."""
        gathered = self._gather(self._order[step])
        # The queue is advanced past the uses of this module, except those that a prefetch has already taken.
        queued = {parameter for parameter in self._order[step] if self._fetched_for[parameter] < step}
        while queued:
            use = self._queue.popleft()
            self._fetched_for[use.parameter] = use.step
            queued.discard(use.parameter)
        return gathered

    def prefetch(self) -> int:
        """Gather the next parameters of the queue up to the limits; return their elements.

        A parameter that begins below a limit is gathered whole.
        """
        room = min(self._rules.max_live - self.num_live, self._rules.prefetch)
        gathered = 0
        while self._queue and gathered < room:
            use = self._queue.popleft()
            self._fetched_for[use.parameter] = max(self._fetched_for[use.parameter], use.step)
            gathered += self._gather([use.parameter])
        return gathered

    def release(self, step: int) -> None:
        """Release parameters of the module at `step`, unless they were prefetched for later or are used again soon."""
        next_step = step + 1  # DeepSpeed has incremented its step id when it releases
        released = {parameter for parameter in self._order[step] if self._fetched_for[parameter] <= next_step}
        num_traversed = 0
        for later in self._order[next_step:]:
            if num_traversed >= self._rules.max_reuse or not released:
                break
            released -= set(later)
            num_traversed += _numel(later)
        released &= self._available
        self._available -= released
        self.num_live -= _numel(released)

    def _gather(self, parameters: Iterable[nn.Parameter]) -> int:
        """Make these parameters available; return the elements of those that were not."""
        missing = set(parameters) - self._available - self.persistent
        self._available |= missing
        gathered = _numel(missing)
        self.num_live += gathered
        return gathered


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
