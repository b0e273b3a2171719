"""Sums over the steps of one log line, reduced over the ranks in one message."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cogvlm_ft.planning.flops import StepFlops
from cogvlm_ft.runtime.distributed import all_reduce_sum, device, rank, world_size
from cogvlm_ft.train.step import StepStats


@dataclass(frozen=True)
class Timing:
    """Seconds per step of one rank.

    own_s: without waiting for other ranks before the first pass. data_wait_s: the part of it spent waiting for data.
    """

    own_s: float
    data_wait_s: float


@dataclass(frozen=True)
class Report:
    """A log line, the same on every rank.

    values: to log. losses: of each step, NaN for a skipped one. ranks: one Timing each.
    """

    values: dict[str, float]
    losses: list[float]
    ranks: list[Timing]


class Meter:
    """Collects steps and reports them as one dict of numbers."""

    def __init__(self, flops: StepFlops, *, has_box_loss: bool = False) -> None:
        """Set up. has_box_loss: whether the loss holds more than the cross entropy, which is then reported too."""
        self._flops = flops
        self._has_box_loss = has_box_loss
        self._steps: list[tuple[StepStats, float]] = []
        self._num_skipped = 0

    def add(self, stats: StepStats, data_wait_s: float) -> None:
        """Record a step and how many seconds it waited for its data."""
        self._steps.append((stats, data_wait_s))

    def report(self) -> Report:
        """Return means and rates since the last report. Collective.

        Skipped steps count as time, but not in the loss.
        """
        steps = [step for step, _ in self._steps]
        times, loss_sums, entropies = self._reduce()
        self._steps = []
        self._num_skipped += sum(step.is_skipped for step in steps)
        values = {
            "loss": _mean_loss(steps, loss_sums),
            **({"cross_entropy": _mean_loss(steps, entropies)} if self._has_box_loss else {}),
            "grad_norm": steps[-1].grad_norm,
            **self._rates(steps, times),
            "memory_gib": peak_memory_gib(),
            "num_bad": float(sum(step.num_bad for step in steps)),
            "num_cut_boxes": float(sum(step.num_cut_boxes for step in steps)),
            "num_skipped": float(self._num_skipped),
            **_slowest(times, len(steps)),
        }
        pairs = zip(loss_sums, steps, strict=True)
        losses = [float("nan") if each.is_skipped else loss / max(1, each.num_target_tokens) for loss, each in pairs]
        timings = [Timing(each.own_s / len(steps), each.data_wait_s / len(steps)) for each in times]
        return Report(values, losses, timings)

    def _reduce(self) -> tuple[list[_RankTime], list[float], list[float]]:
        """Return the time of every rank, and sums over all ranks of every step: loss, cross entropy. One all-reduce.

        Without a box loss, the cross entropy is the loss and is not summed again.
        """
        stats, waits = [step for step, _ in self._steps], [wait for _, wait in self._steps]
        busy_s, data_wait_s = sum(step.step_s for step in stats), sum(waits)
        own_s = sum(wait + step.step_s - step.sync_wait_s for step, wait in self._steps)
        slots = [0.0] * (3 * world_size())
        slots[3 * rank() : 3 * rank() + 3] = own_s, data_wait_s, busy_s
        losses = [step.loss_sum.item() for step in stats]
        entropies = [step.row_losses.sum().item() for step in stats] if self._has_box_loss else []
        reduced = all_reduce_sum([*slots, *losses, *entropies])
        times = [_RankTime(*reduced[start : start + 3]) for start in range(0, len(slots), 3)]
        sums = reduced[len(slots) :]
        return times, sums[: len(losses)], sums[len(losses) :]

    def _rates(self, steps: Sequence[StepStats], times: Sequence[_RankTime]) -> dict[str, float]:
        """Return what was done per second, by the mean time of the ranks."""
        busy_s, wait_s = sum(each.busy_s for each in times), sum(each.data_wait_s for each in times)
        seconds = (busy_s + wait_s) / len(times)
        flops = sum(
            self._flops.of(step.num_images, step.num_turns, step.num_tokens, step.num_target_tokens) for step in steps
        )
        return {
            "images_per_s": sum(step.num_images for step in steps) / seconds,
            "turns_per_s": sum(step.num_turns for step in steps) / seconds,
            "tokens_per_s": sum(step.num_tokens for step in steps) / seconds,
            "step_s": seconds / len(steps),
            "data_wait_fraction": wait_s / (busy_s + wait_s),
            **self._flops.rates(flops, seconds),
        }


class _RankTime(NamedTuple):
    """Seconds of one rank over all steps of a log line. own_s: as in Timing. busy_s: in steps."""

    own_s: float
    data_wait_s: float
    busy_s: float


def _mean_loss(steps: Sequence[StepStats], loss_sums: Sequence[float]) -> float:
    """Return the mean over the target tokens of all steps that were not skipped; NaN if all were."""
    made = [(loss, step.num_target_tokens) for loss, step in zip(loss_sums, steps, strict=True) if not step.is_skipped]
    return sum(loss for loss, _ in made) / max(1, sum(num for _, num in made)) if made else float("nan")


def _slowest(times: Sequence[_RankTime], num_steps: int) -> dict[str, float]:
    """Describe the rank with the most time of its own."""
    own = [each.own_s for each in times]
    slowest = max(range(len(own)), key=own.__getitem__)
    return {
        "slowest_rank": float(slowest),
        "slowest_rank_ratio": own[slowest] * len(own) / sum(own),
        "slowest_rank_data_wait_s": times[slowest].data_wait_s / num_steps,
    }


def peak_memory_gib() -> float:
    """Return this rank's peak memory: of the GPU's allocator since the last call, or of the process on CPU."""
    if device().type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
