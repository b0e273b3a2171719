"""The plan: every sample once an epoch, the same for every world size, from any position."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cogvlm_ft.data.plan import SamplePlan, rank_part
from cogvlm_ft.errors import ConfigError

SIZES = list(itertools.product([1, 2, 7, 16, 100], [1, 4, 12, 128]))


def real_samples(plan: SamplePlan, consumed: int, num_steps: int) -> tuple[list[int], int]:
    """What a run sees, with one number as its only state."""
    seen: list[int] = []
    for _ in range(num_steps):
        indices, weights = plan.global_batch(*plan.position(consumed))
        seen += indices[weights > 0].tolist()
        consumed += int(weights.sum())
    return seen, consumed


@pytest.mark.parametrize(("num_samples", "batch"), SIZES)
def test_every_sample_exactly_once_an_epoch(num_samples: int, batch: int) -> None:
    plan = SamplePlan(num_samples, batch, seed=3)
    seen, consumed = real_samples(plan, 0, plan.steps_per_epoch)
    assert sorted(seen) == list(range(num_samples)) and consumed == num_samples
    second, consumed = real_samples(plan, consumed, plan.steps_per_epoch)
    assert sorted(second) == list(range(num_samples)) and consumed == 2 * num_samples


@pytest.mark.parametrize(("num_samples", "batch"), SIZES)
def test_batches_are_always_full_and_padding_weighs_nothing(num_samples: int, batch: int) -> None:
    plan = SamplePlan(num_samples, batch, seed=3)
    order = plan.order(5)
    for offset in range(0, num_samples, max(1, num_samples // 9)):
        indices, weights = plan.global_batch(5, offset)
        assert indices.shape == weights.shape == (batch,)
        assert (indices.dtype, weights.dtype) == (np.int64, np.float32)
        num_real = min(batch, num_samples - offset)
        assert weights.tolist() == [1.0] * num_real + [0.0] * (batch - num_real)
        assert indices[:num_real].tolist() == order[offset : offset + num_real].tolist()
        assert indices[num_real:].tolist() == [order[i % num_samples] for i in range(batch - num_real)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_the_union_over_ranks_is_the_global_batch_for_every_world_size(world_size: int) -> None:
    plan = SamplePlan(50, 24, seed=0)
    for offset in (0, 24, 48):
        indices, weights = plan.global_batch(0, offset)
        for micro_batch_size in (1, 2):
            parts = [
                rank_part(indices, weights, rank=r, world_size=world_size, micro_batch_size=micro_batch_size)
                for r in range(world_size)
            ]
            num_micro_steps = 24 // (world_size * micro_batch_size)
            assert [len(part) for part in parts] == [num_micro_steps] * world_size
            assert all(len(i) == len(w) == micro_batch_size for part in parts for i, w in part)
            in_order = [part[m] for m in range(num_micro_steps) for part in parts]
            assert np.concatenate([i for i, _ in in_order]).tolist() == indices.tolist()
            assert np.concatenate([w for _, w in in_order]).tolist() == weights.tolist()


def test_a_run_resumed_anywhere_sees_what_it_would_have_seen() -> None:
    plan = SamplePlan(10, 4, seed=1)
    whole, _ = real_samples(plan, 0, 9)
    for steps in range(9):
        before, consumed = real_samples(plan, 0, steps)
        after, _ = real_samples(SamplePlan(10, 4, seed=1), consumed, 9 - steps)
        assert before + after == whole


def test_a_run_resumed_with_another_batch_size_misses_and_repeats_nothing() -> None:
    seen, consumed = real_samples(SamplePlan(23, 6, seed=1), 0, 2)
    rest, consumed = real_samples(SamplePlan(23, 4, seed=1), consumed, 3)
    assert consumed == 23 and sorted(seen + rest) == list(range(23))


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    assert SamplePlan(100, 4, 1).order(2).tolist() == SamplePlan(100, 32, 1).order(2).tolist()
    orders = [SamplePlan(100, 4, seed).order(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert SamplePlan(8, 4, 0).order(0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]  # must never change: runs are resumed


def test_the_cached_order_cannot_be_spoiled() -> None:
    with pytest.raises(ValueError, match="read-only"):
        SamplePlan(5, 2, 0).order(0)[0] = 9


def test_a_batch_that_cannot_be_dealt_out_names_the_nearest_sizes() -> None:
    indices, weights = SamplePlan(100, 30, 0).global_batch(0, 0)
    with pytest.raises(ConfigError, match=r"global_batch_size=30 .* 4 \* 2 = 8; set it to 24 or 32"):
        rank_part(indices, weights, rank=0, world_size=4, micro_batch_size=2)
    with pytest.raises(ConfigError, match=r"set it to 32$"):
        rank_part(indices[:3], weights[:3], rank=0, world_size=16, micro_batch_size=2)


@pytest.mark.parametrize("numbers", [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_numbers_out_of_range(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="wanted"):
        SamplePlan(*numbers)
