"""Warnings of a run that goes on but not well: they come where they should, and not where they should not."""

from __future__ import annotations

import logging
import mmap
import random

import pytest

from cogvlm_ft.train.health import MIB, CreepingMemory, Health, LossSpikes, SlowRanks, process_bytes
from cogvlm_ft.train.meter import Report, Timing


def falling_losses(num_steps: int, noise: float = 0.08, seed: int = 0) -> list[float]:
    """As a training's: falling, with noise that grows with the loss."""
    rng = random.Random(seed)
    return [(0.3 + 2.2 * 0.99**step) * rng.lognormvariate(0, noise) for step in range(num_steps)]


def spikes_of(losses: list[float]) -> list[int]:
    spikes = LossSpikes()
    return [number for number, loss in enumerate(losses) if spikes.add(loss)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_a_loss_that_only_falls_and_wobbles_has_no_spike(seed: int, noise: float) -> None:
    assert spikes_of(falling_losses(500, noise, seed)) == []


def test_spikes_are_found_one_by_one() -> None:
    losses = falling_losses(400)
    for step in (60, 61, 250):
        losses[step] *= 4
    assert spikes_of(losses) == [60, 61, 250]


def test_nothing_is_said_before_there_is_anything_to_compare_with() -> None:
    assert spikes_of([1.0] * (LossSpikes.LEAST - 1) + [50.0]) == []


def test_a_new_level_is_not_called_a_spike_for_ever() -> None:
    found = spikes_of([1.0] * 50 + [3.0] * 200)
    assert found == list(range(50, 50 + LossSpikes.LEAST))


@pytest.mark.slow
def test_memory_that_really_grows_is_told_again_and_again_but_not_at_every_step() -> None:
    memory, kept, told = CreepingMemory("process memory"), [], []
    for step in range(420):
        kept.append(mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))  # never out of a heap's leftovers
        kept[-1].write(b"x" * MIB)
        if warning := memory.add(process_bytes()):
            told.append((step, warning))
    assert [step for step, _ in told] == [199, 349]
    assert "process memory of rank 0 grows: " in told[0][1]
    growth = float(told[0][1].partition("GiB, ")[2].split()[0])
    assert growth == pytest.approx(100, rel=0.1), told


def test_memory_that_is_needed_once_or_now_and_then_does_not_creep() -> None:
    memory, rng = CreepingMemory("x"), random.Random(0)
    level = 1000 * MIB
    for step in range(2000):
        level += 500 * MIB if step in (30, 700) else 0  # the first batch, the first checkpoint
        assert memory.add(level + rng.randrange(300) * MIB + rng.randrange(4) * MIB) is None


def test_memory_that_reaches_its_level_does_not_creep() -> None:
    """As an allocator's does in the first epochs: 0.70, 0.72, 0.73 GiB."""
    small, falling = CreepingMemory("x"), CreepingMemory("x")
    for block, level in enumerate((0, 400, 560, 630, 660, 660)):
        for _ in range(CreepingMemory.BLOCK):
            assert small.add((700 + 10 * block) * MIB) is None
            assert falling.add((700 + level) * MIB) is None


def lines(slow_s: float, num_ranks: int, num_lines: int, wait_s: float = 0.0) -> list[list[Timing]]:
    rng = random.Random(0)
    return [
        [
            Timing(rng.uniform(0.9, 1.1) + (slow_s if number == 1 else 0), wait_s * (number == 1))
            for number in range(num_ranks)
        ]
        for _ in range(num_lines)
    ]


def test_a_rank_that_is_always_last_is_named_once_a_window() -> None:
    slow = SlowRanks()
    told = [warning for line in lines(0.8, 4, 2 * SlowRanks.WINDOW, wait_s=0.8) if (warning := slow.add(line))]
    assert len(told) == 2 and told[0].startswith("rank 1 is slow: 1.8")
    assert "it waits 0.80 s for data, the median rank 0.00 s" in told[0]


@pytest.mark.parametrize(("slow_s", "num_ranks"), [(0.1, 4), (0.0, 2), (5.0, 1)])
def test_ranks_that_are_about_equally_fast_are_not(slow_s: float, num_ranks: int) -> None:
    slow = SlowRanks()
    ranks = lines(slow_s, max(2, num_ranks), 100)
    assert not any(slow.add(line[:num_ranks]) for line in ranks)


def test_a_rank_that_is_late_once_in_a_while_is_not_slow() -> None:
    slow, late = SlowRanks(), [Timing(1.0, 0.0), Timing(9.0, 8.0)]
    assert not any(slow.add(late if number % 3 == 0 else lines(0, 2, 1)[0]) for number in range(100))


def test_the_samples_of_a_spike_are_named_and_it_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    health, count = Health(), 0.0
    losses = [1.0 + 0.01 * (step % 3) for step in range(60)]
    losses[44] = 7.5
    losses[50] = float("nan")  # a skipped step
    with caplog.at_level(logging.WARNING):
        for first in range(0, 60, 6):  # a log line of six steps
            for step in range(first, first + 6):
                health.add([f"photo-{step}-a", f"photo-{step}-b"])
            report = Report({}, losses[first : first + 6], [Timing(1.0, 0.0)])
            count = health.report(report, first + 6)["loss_spike"]
    assert count == 1
    assert [record.getMessage() for record in caplog.records] == [
        "loss spike: 7.5 at step 45, 1.01 is usual; its samples: photo-44-a, photo-44-b"
    ]
