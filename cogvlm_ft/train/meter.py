"""Sums over the steps of one log line; one all-reduce per line."""

from __future__ import annotations

import resource
from dataclasses import dataclass

import torch

from cogvlm_ft.planning.flops import StepFlops
from cogvlm_ft.runtime.distributed import all_reduce_sum, device, rank, world_size
from cogvlm_ft.train.step import StepStats


@dataclass(frozen=True)
class Timing:
    """Of one rank, in a mean step of a log line: what it took by itself, which is all but waiting for the others before
    the first pass; and how much of that it waited for its data."""

    own_s: float
    data_wait_s: float


@dataclass(frozen=True)
class Report:
    """The same on every rank. values: for the log line. losses: of the single steps, NaN for a skipped one. ranks: one
    Timing each."""

    values: dict[str, float]
    losses: list[float]
    ranks: list[Timing]


class Meter:
    """Collects steps, and reports them as one dict of numbers."""

    def __init__(self, flops: StepFlops) -> None:
        self._flops = flops
        self._steps: list[tuple[StepStats, float]] = []
        self._num_skipped = 0

    def add(self, stats: StepStats, data_wait_s: float) -> None:
        self._steps.append((stats, data_wait_s))

    def report(self) -> Report:
        """Collective. Means and rates since the last report. Skipped steps count as time, but not in the loss."""
        stats = [step for step, _ in self._steps]
        own_s = sum(wait + step.step_s - step.sync_wait_s for step, wait in self._steps)
        busy_s, wait_s = sum(step.step_s for step in stats), sum(wait for _, wait in self._steps)
        slots = [0.0] * (3 * world_size())
        slots[3 * rank() : 3 * rank() + 3] = own_s, wait_s, busy_s
        reduced = all_reduce_sum([*slots, *(step.loss_sum.item() for step in stats)])
        own, waits, busy = (reduced[part : len(slots) : 3] for part in range(3))
        loss_sums, num_steps = reduced[len(slots) :], len(stats)
        seconds = (sum(busy) + sum(waits)) / world_size()
        flops = sum(
            self._flops.of(step.num_images, step.num_turns, step.num_tokens, step.num_target_tokens) for step in stats
        )
        pairs = list(zip(loss_sums, stats, strict=True))
        made = [(loss, step.num_target_tokens) for loss, step in pairs if not step.is_skipped]
        self._num_skipped += num_steps - len(made)
        slowest = max(range(world_size()), key=own.__getitem__)
        values = {
            "loss": sum(loss for loss, _ in made) / max(1, sum(num for _, num in made)) if made else float("nan"),
            "grad_norm": stats[-1].grad_norm,
            "images_per_s": sum(step.num_images for step in stats) / seconds,
            "turns_per_s": sum(step.num_turns for step in stats) / seconds,
            "tokens_per_s": sum(step.num_tokens for step in stats) / seconds,
            "step_s": seconds / num_steps,
            "data_wait_fraction": sum(waits) / (sum(busy) + sum(waits)),
            **self._flops.rates(flops, seconds),
            "memory_gib": peak_memory_gib(),
            "num_bad": float(sum(step.num_bad for step in stats)),
            "num_cut_boxes": float(sum(step.num_cut_boxes for step in stats)),
            "num_skipped": float(self._num_skipped),
            "slowest_rank": float(slowest),
            "slowest_rank_ratio": own[slowest] * world_size() / sum(own),
            "slowest_rank_data_wait_s": waits[slowest] / num_steps,
        }
        self._steps = []
        losses = [float("nan") if each.is_skipped else loss / max(1, each.num_target_tokens) for loss, each in pairs]
        timings = [Timing(each / num_steps, wait / num_steps) for each, wait in zip(own, waits, strict=True)]
        return Report(values, losses, timings)


def peak_memory_gib() -> float:
    """This rank's peak: of the GPU's allocator, or of the process on CPU."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
