"""The plan: every sample once per epoch, the same for every world size, from any position."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest

from cogvlm_ft.data.plan import SamplePlan, most_bad, plan_samples, rank_items
from cogvlm_ft.errors import ConfigError

SIZES = list(itertools.product([1, 2, 7, 16, 100], [1, 4, 12, 128]))


def real_samples(plan: SamplePlan, consumed: int, num_steps: int) -> tuple[list[int], int]:
    """Simulate what a run sees, with one number as its only state."""
    seen: list[int] = []
    for _ in range(num_steps):
        indices, _, weights = plan.global_batch(*plan.position(consumed))
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
        indices, passes, weights = plan.global_batch(5, offset)
        assert passes.tolist() == [5] * batch
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
        whole = plan.global_batch(0, offset)
        for micro_batch_size in (1, 2):
            parts = [
                rank_items(whole, rank=r, world_size=world_size, micro_batch_size=micro_batch_size)
                for r in range(world_size)
            ]
            num_micro_steps = 24 // (world_size * micro_batch_size)
            assert [len(part) for part in parts] == [num_micro_steps] * world_size
            assert all(len(micro) == micro_batch_size for part in parts for micro in part)
            in_order = [item for m in range(num_micro_steps) for part in parts for item in part[m]]
            assert [item.index for item in in_order] == whole.indices.tolist()
            assert [item.epoch for item in in_order] == whole.passes.tolist()
            assert [item.weight for item in in_order] == whole.weights.tolist()


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


@pytest.mark.parametrize("seed", range(40))
def test_any_sequence_of_batch_sizes_ends_at_exactly_the_last_epoch(seed: int) -> None:
    """Each attempt has a batch size of its own and is stopped somewhere; the number of ranks is no part of the plan."""
    chance = random.Random(seed)
    num_samples, epochs, consumed = chance.randrange(1, 60), chance.randrange(1, 5), 0
    seen: Counter[int] = Counter()
    rates: list[float] = []
    while True:
        plan = SamplePlan(num_samples, chance.choice([1, 2, 3, 8, 16, 100]), seed=3)
        num_steps = plan.steps_left(consumed, epochs)
        for left in range(num_steps, max(0, num_steps - chance.randrange(1, 30)), -1):
            assert plan.steps_left(consumed, epochs) == left
            rates.append(plan.steps_done(consumed) / (epochs * plan.steps_per_epoch))
            found, consumed = real_samples(plan, consumed, 1)
            seen.update(found)
        if not plan.steps_left(consumed, epochs):
            break
    assert consumed == epochs * num_samples
    assert plan.steps_done(consumed) == epochs * plan.steps_per_epoch
    assert seen == Counter({number: epochs for number in range(num_samples)})
    assert min(rates) >= 0 and max(rates) < 1  # the learning rate: neither past its end nor at its start again


def test_positions_of_one_batch_size_are_whole_steps() -> None:
    plan = SamplePlan(50, 8, seed=0)
    consumed = 0
    for step in range(3 * plan.steps_per_epoch):
        assert plan.steps_done(consumed) == step  # exactly: the learning rate of such runs stays as it was
        _, consumed = real_samples(plan, consumed, 1)
    assert plan.steps_left(consumed, epochs=2) == 0  # fewer epochs than are done


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    assert SamplePlan(100, 4, 1).order(2).tolist() == SamplePlan(100, 32, 1).order(2).tolist()
    orders = [SamplePlan(100, 4, seed).order(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert SamplePlan(8, 4, 0).order(0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]  # must never change: runs are resumed


def test_the_cached_order_cannot_be_spoiled() -> None:
    with pytest.raises(ValueError, match="read-only"):
        SamplePlan(5, 2, 0).order(0)[0] = 9


def test_a_batch_that_cannot_be_dealt_out_names_the_nearest_sizes() -> None:
    batch = SamplePlan(100, 30, 0).global_batch(0, 0)
    with pytest.raises(ConfigError, match=r"global_batch_size: 30 .* 4 ranks x .*=2; expected 24 or 32"):
        rank_items(batch, rank=0, world_size=4, micro_batch_size=2)
    with pytest.raises(ConfigError, match=r"expected 32$"):
        rank_items(SamplePlan(3, 3, 0).global_batch(0, 0), rank=0, world_size=16, micro_batch_size=2)


@pytest.mark.parametrize("numbers", [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_numbers_out_of_range(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match=r"SamplePlan\.\w+: found .*; expected at least"):
        SamplePlan(*numbers)


def epochs_of(plan: SamplePlan, num_epochs: int) -> list[list[int]]:
    return [plan.order(epoch).tolist() for epoch in range(num_epochs)]


def mixed(sizes: list[int], weights: list[float], batch: int = 4, seed: int = 1) -> SamplePlan:
    return plan_samples(sizes, weights, global_batch_size=batch, seed=seed)


def test_weights_of_one_change_nothing() -> None:
    assert mixed([7, 9], [1.0, 1.0]) == SamplePlan(16, 4, 1)


@pytest.mark.parametrize("weight", [0.1, 0.3, 0.5, 1, 1.5, 2, 3.7])
def test_a_source_is_drawn_by_its_weight_and_seen_whole_before_anything_twice(weight: float) -> None:
    plan = mixed([10, 20], [weight, 1.0])
    per_epoch = round(10 * weight)
    walk: list[int] = []
    for order in epochs_of(plan, 10):
        assert len(order) == plan.num_samples == per_epoch + 20
        assert sorted(i for i in order if i >= 10) == list(range(10, 30))
        walk += [i for i in order if i < 10]
        counts = np.bincount(walk, minlength=10)
        assert counts.sum() == len(walk) and counts.max() - counts.min() <= 1


def test_two_halves_are_all_and_the_next_two_are_other_halves() -> None:
    halves = [set(order) for order in epochs_of(mixed([100], [0.5]), 4)]
    assert all(len(half) == 50 for half in halves)
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(100))
    assert halves[0] not in (halves[2], halves[3])


def test_weights_are_exact_decimals() -> None:
    assert mixed([10**6], [0.1]).num_samples == 10**5  # and not one more, as 0.1 is in binary
    assert mixed([3], [0.001]).num_samples == 1


def test_passes_count_the_walks_through_each_source() -> None:
    plan = mixed([4, 4], [2.0, 0.5], batch=10)
    for epoch in range(4):
        indices, passes, weights = plan.global_batch(epoch, 0)
        first = sorted(zip(indices[indices < 4].tolist(), passes[indices < 4].tolist(), strict=True))
        assert first == [(i, 2 * epoch + turn) for i in range(4) for turn in (0, 1)]  # never the same twice
        assert set(passes[indices >= 4].tolist()) == {epoch // 2} and weights.all()


def test_a_mixed_run_resumed_anywhere_sees_what_it_would_have_seen() -> None:
    whole, _ = real_samples(mixed([5, 8], [1.5, 0.25]), 0, 12)
    for steps in range(12):
        before, consumed = real_samples(mixed([5, 8], [1.5, 0.25]), 0, steps)
        after, _ = real_samples(mixed([5, 8], [1.5, 0.25]), consumed, 12 - steps)
        assert before + after == whole


def test_a_mixed_order_never_changes() -> None:
    assert epochs_of(mixed([3, 4], [2.0, 0.5], seed=0), 2) == [[1, 0, 1, 4, 2, 5, 0, 2], [6, 1, 0, 0, 3, 2, 1, 2]]


@pytest.mark.parametrize(
    ("fraction", "num_samples", "most"), [(0.01, 34, 1), (0.01, 1000, 10), (0.0, 34, 0), (1, 5, 5)]
)
def test_one_unusable_sample_does_not_end_a_small_set(fraction: float, num_samples: int, most: int) -> None:
    assert most_bad(fraction, num_samples) == most
