"""How passes without gradients get their parameters under ZeRO-3: gathered once for all passes, or layer by layer.

Gathered once, passes need no other rank and cost the same as without ZeRO, but the whole model must fit next to what
each rank holds. Layer by layer, a rank holds one layer at a time, and all ranks must make the same passes.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import deepspeed
import psutil
import torch
from torch import nn

from cogvlm_ft.runtime.distributed import device, every_rank, is_main, world_size

logger = logging.getLogger(__name__)

# Of the free memory, for the gathered model; the rest is for the key-value cache and activations.
FREE_FRACTION = 0.6


@contextlib.contextmanager
def parameters_gathered(model: nn.Module, mode: str) -> Iterator[None]:
    """Prepare the model for calls without gradients inside; restore it for training afterwards. Collective.

    mode: "once", "layerwise", or "auto": once if it fits on every rank. A model without ZeRO-3 is left as it is.
    """
    offload = _offload(model)
    if offload is None:
        yield
    elif mode == "once" or (mode == "auto" and fits_everywhere(whole_bytes(model), free_bytes())):
        with _gathered_once(model, offload):
            yield
    else:
        forget_order(model)
        try:
            yield
        finally:
            forget_order(model)


def attach_offload(model: nn.Module, engine: Any) -> None:
    """Store on `model` the part of its engine that gathers its parameters; called once, by build_engine."""
    offload = engine.optimizer  # without an optimizer it is this part alone
    model.__dict__["zero_offload"] = getattr(offload, "parameter_offload", offload)


def needs_all_ranks(model: nn.Module) -> bool:
    """Return whether a pass through the model is collective now."""
    offload = _offload(model)
    return offload is not None and bool(offload.forward_hooks) and world_size() > 1


def forget_order(model: nn.Module) -> None:
    """Discard the recorded order of modules; every rank calls this before a pass that calls other modules.

    DeepSpeed prefetches in the order of the last pass that it recorded: decoding would begin by gathering the vision
    tower and the vision experts, which it never calls.
    """
    offload = _offload(model)
    if offload is not None and not offload.get_param_coordinator().is_invalid_trace():
        offload.get_param_coordinator()._invalidate_trace()


def whole_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters together, unpartitioned."""
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())


def free_bytes() -> int:
    """Return the memory that this rank can still allocate: on its GPU, or its part of the machine's."""
    if device().type == "cuda":
        unused_by_torch = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused_by_torch
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    return psutil.virtual_memory().available // ranks_here


def fits_everywhere(num_bytes: int, num_free: int) -> bool:
    """Return whether `num_bytes` fit into `num_free` on every rank: the same answer on all ranks. Collective."""
    fits = every_rank(num_bytes <= FREE_FRACTION * num_free)
    if is_main():
        how = "once" if fits else "layer by layer"
        logger.info(
            "parameters are gathered %s: %.1f GiB, %.1f GiB free on rank 0", how, num_bytes / 2**30, num_free / 2**30
        )
    return fits


def _offload(model: nn.Module) -> Any:
    return model.__dict__.get("zero_offload")


@contextlib.contextmanager
def _gathered_once(model: nn.Module, offload: Any) -> Iterator[None]:
    """Gather all parameters and remove ZeRO-3's hooks inside. Collective.

    With its hooks, each pass would partition the parameters that it has used, and the first pass would communicate with
    all ranks because the order of modules is unknown.
    """
    forget_order(model)
    for parameter in model.parameters():
        parameter.ds_active_sub_modules.clear()  # type: ignore[attr-defined]
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        offload._remove_module_hooks()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload.setup_zero_stage3_hooks()
            deepspeed.runtime.zero.parameter_offload.FWD_MODULE_STACK.pop()  # setup has pushed the model a second time
