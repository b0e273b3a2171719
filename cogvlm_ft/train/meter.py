"""Sums over the steps of one log line; one all-reduce per line."""

from __future__ import annotations

import resource

import torch

from cogvlm_ft.runtime.distributed import all_reduce_sum, device, world_size
from cogvlm_ft.train.step import StepStats
from cogvlm_ft.train.utilization import StepFlops


class Meter:
    """Collects steps, and reports them as one dict of numbers."""

    def __init__(self, flops: StepFlops) -> None:
        self._flops = flops
        self._steps: list[tuple[StepStats, float]] = []

    def add(self, stats: StepStats, data_wait_s: float) -> None:
        self._steps.append((stats, data_wait_s))

    def report(self) -> dict[str, float]:
        """Collective. Means and rates since the last report, the same on every rank."""
        stats = [step for step, _ in self._steps]
        loss_sum, busy_s, wait_s = all_reduce_sum(
            [
                float(sum(step.loss_sum.item() for step in stats)),
                sum(step.step_s for step in stats),
                sum(wait for _, wait in self._steps),
            ]
        )
        seconds = (busy_s + wait_s) / world_size()
        flops = sum(
            self._flops.of(step.num_images, step.num_turns, step.num_tokens, step.num_target_tokens) for step in stats
        )
        values = {
            "loss": loss_sum / max(1, sum(step.num_target_tokens for step in stats)),
            "grad_norm": stats[-1].grad_norm,
            "images_per_s": sum(step.num_images for step in stats) / seconds,
            "turns_per_s": sum(step.num_turns for step in stats) / seconds,
            "tokens_per_s": sum(step.num_tokens for step in stats) / seconds,
            "step_s": seconds / len(stats),
            "data_wait_fraction": wait_s / (busy_s + wait_s),
            **self._flops.rates(flops, seconds),
            "memory_gib": peak_memory_gib(),
            "num_bad": float(sum(step.num_bad for step in stats)),
            "num_cut_boxes": float(sum(step.num_cut_boxes for step in stats)),
        }
        self._steps = []
        return values


def peak_memory_gib() -> float:
    """This rank's peak: of the GPU's allocator, or of the process on CPU."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
