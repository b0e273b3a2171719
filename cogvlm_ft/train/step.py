"""One optimizer step: count the target tokens of the whole step first, then forward, backward, update."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cogvlm_ft.data.collate import Batch
from cogvlm_ft.runtime.distributed import all_reduce_sum, device, rank, world_size

MAX_RANKS = 1_000_000  # keeps the random streams of (seed, step, rank) apart


@dataclass(frozen=True)
class StepStats:
    """loss_sum is this rank's, float[]; the counts are those of all ranks."""

    loss_sum: Tensor
    num_target_tokens: int
    num_images: int
    num_turns: int
    num_tokens: int
    num_bad: int
    num_cut_boxes: int
    grad_norm: float
    step_s: float


def train_step(engine: Any, batches: Sequence[Batch], *, lr: float, seed: int, step: int) -> StepStats:
    """Collective. `batches` are the micro-batches of this rank, as many on every rank.

    The loss is the mean over all target tokens of the step: over micro-batches and ranks, not of their means. DeepSpeed
    divides by the accumulation steps and averages over the ranks; num_items_in_batch undoes both.
    """
    start = time.perf_counter()
    torch.manual_seed((seed * MAX_RANKS + rank()) * MAX_RANKS + step)  # dropout: the same when resumed
    counts = all_reduce_sum(
        [
            sum(batch.num_target_tokens for batch in batches),
            sum(float(batch.weight.sum()) for batch in batches),
            sum(batch.num_turns for batch in batches),
            sum(batch.num_tokens for batch in batches),
            sum(len(batch.bad) for batch in batches),
            sum(batch.num_cut_boxes for batch in batches),
        ]
    )
    num_target_tokens = max(1.0, counts[0])
    scale = world_size() * len(batches) / num_target_tokens
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    loss_sum = torch.zeros((), device=device())
    for batch in (batch.to(device()) for batch in batches):
        loss = engine(
            input_ids=batch.input_ids,
            pixel_values=batch.pixel_values,
            position_ids=batch.position_ids,
            block_ids=batch.block_ids,
            labels=batch.labels,
            num_items_in_batch=1 / scale,
            return_logits=False,
        ).loss
        engine.backward(loss)
        engine.step()
        loss_sum += loss.detach() / scale
    return StepStats(
        loss_sum=loss_sum,
        num_target_tokens=int(counts[0]),
        num_images=int(counts[1]),
        num_turns=int(counts[2]),
        num_tokens=int(counts[3]),
        num_bad=int(counts[4]),
        num_cut_boxes=int(counts[5]),
        grad_norm=float(engine.get_global_grad_norm() or 0.0),
        step_s=time.perf_counter() - start,
    )
