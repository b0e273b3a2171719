"""One optimizer step: count the target tokens of all ranks first, then forward, backward, update."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cogvlm_ft.data.collate import Batch
from cogvlm_ft.data.plan import Item
from cogvlm_ft.runtime.distributed import all_reduce_sum, device, rank, world_size
from cogvlm_ft.runtime.engine import forget_left_modules
from cogvlm_ft.runtime.stop_signals import StopRequested
from cogvlm_ft.runtime.trained_parameters import set_learning_rate
from cogvlm_ft.runtime.watchdog import progress

MAX_RANKS = 1_000_000  # keeps the random streams of (seed, step, rank) apart


@dataclass(frozen=True)
class StepStats:
    """The result of a step; counts are over all ranks.

    loss_sum: float[], row_losses: float[rows]: of this rank's micro-batches. sync_wait_s: the part of step_s spent
    waiting for the other ranks before the first pass. is_skipped: the loss or the gradient was not finite on some rank,
    so no rank changed anything; grad_norm is inf then.
    """

    loss_sum: Tensor
    row_losses: Tensor
    num_target_tokens: int
    num_images: int
    num_turns: int
    num_tokens: int
    num_bad: int
    num_cut_boxes: int
    grad_norm: float
    step_s: float
    sync_wait_s: float = 0.0
    is_skipped: bool = False


@dataclass(frozen=True)
class RowLoss:
    """One row of a step. loss: the sum over its labelled tokens. num_target_tokens: 0 for a row without labels."""

    key: str
    item: Item
    loss: float
    num_target_tokens: int


def train_step(engine: Any, batches: Sequence[Batch], *, lr: float, seed: int, step: int) -> StepStats:
    """Run forward, backward and update on this rank's micro-batches, as many on every rank. Collective.

    The loss is the mean over all target tokens of the step, over micro-batches and ranks together. DeepSpeed divides by
    the accumulation steps and averages over the ranks; num_items_in_batch undoes both.

    DeepSpeed leaves weights and optimizer unchanged on all ranks where the norm of the whole gradient, which it reduces
    over the ranks, is not finite. A loss that is not finite is turned into such a gradient.

    Raises StopRequested on every rank, before anything is changed, if one of them has no micro-batches.
    """
    start = time.perf_counter()
    torch.manual_seed(((seed * MAX_RANKS + rank()) * MAX_RANKS + step) % 2**64)  # dropout: the same when resumed
    counts = all_reduce_sum(_counts(batches))
    if counts[-1]:
        raise StopRequested
    sync_wait_s = time.perf_counter() - start
    num_target_tokens = max(1.0, counts[0])
    scale = world_size() * len(batches) / num_target_tokens
    set_learning_rate(engine.optimizer, lr)
    loss_sum, losses = torch.zeros((), device=device()), []
    for batch in (batch.to(device()) for batch in batches):
        out = engine(
            input_ids=batch.input_ids,
            pixel_values=batch.pixel_values,
            position_ids=batch.position_ids,
            block_ids=batch.block_ids,
            labels=batch.labels,
            num_items_in_batch=1 / scale,
            return_logits=False,
        )
        loss = out.loss.detach()
        engine.backward(out.loss * torch.where(loss.isfinite(), 1.0, torch.nan))
        engine.step()
        progress()
        loss_sum += loss / scale
        losses.append(out.row_losses)
    forget_left_modules(engine)
    return StepStats(
        loss_sum=loss_sum,
        row_losses=torch.cat(losses),
        num_target_tokens=int(counts[0]),
        num_images=int(counts[1]),
        num_turns=int(counts[2]),
        num_tokens=int(counts[3]),
        num_bad=int(counts[4]),
        num_cut_boxes=int(counts[5]),
        grad_norm=float(engine.get_global_grad_norm() or 0.0),
        step_s=time.perf_counter() - start,
        sync_wait_s=sync_wait_s,
        is_skipped=not engine.was_step_applied(),
    )


def _counts(batches: Sequence[Batch]) -> list[float]:
    """Count what StepStats holds, in its order, and whether there is nothing to count."""
    return [
        sum(batch.num_target_tokens for batch in batches),
        sum(float(batch.weight.sum()) for batch in batches),
        sum(batch.num_turns for batch in batches),
        sum(batch.num_tokens for batch in batches),
        sum(len(batch.bad) for batch in batches),
        sum(batch.num_cut_boxes for batch in batches),
        float(not batches),
    ]


def row_losses(batches: Sequence[Batch], stats: StepStats) -> list[RowLoss]:
    """Return what the step found for each row of this rank's micro-batches, in their order."""
    keys = [key for batch in batches for key in batch.keys]
    items = [item for batch in batches for item in batch.items]
    tokens = [num for batch in batches for num in batch.row_target_tokens]
    return [RowLoss(*row) for row in zip(keys, items, stats.row_losses.tolist(), tokens, strict=True)]
