"""Learning rates, step by step."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cogvlm_ft.settings import TrainConfig
from cogvlm_ft.train.schedule import lr_at


def rates(num_steps: int, **settings: Any) -> list[float]:
    train = TrainConfig(**settings)
    return [lr_at(step, num_steps, train) for step in range(num_steps)]


def test_by_hand() -> None:
    """Four steps of warm-up, then a cosine from 8 down to 2 over sixteen."""
    found = rates(20, lr=8.0, min_lr_ratio=0.25, warmup_fraction=0.2)
    assert found[:5] == [2.0, 4.0, 6.0, 8.0, 8.0]
    assert found[4 + 8] == pytest.approx(5.0)
    assert found[4 + 4] == pytest.approx(5.0 + 3.0 * math.sqrt(0.5))
    assert found[4 + 12] == pytest.approx(5.0 - 3.0 * math.sqrt(0.5))


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 999])
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("min_lr_ratio", [0.0, 0.1, 1.0])
def test_it_rises_then_falls_and_stays_in_its_bounds(
    num_steps: int, warmup_fraction: float, min_lr_ratio: float
) -> None:
    found = rates(num_steps, lr=5e-5, warmup_fraction=warmup_fraction, min_lr_ratio=min_lr_ratio)
    num_warmup = math.ceil(warmup_fraction * num_steps)
    assert found[:num_warmup] == sorted(found[:num_warmup])
    assert found[num_warmup:] == sorted(found[num_warmup:], reverse=True)
    assert max(found) == pytest.approx(5e-5)
    assert min(found) > 0
    assert min(found[num_warmup:], default=1.0) >= 5e-5 * min_lr_ratio


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert rates(10, lr=3.0, warmup_fraction=0.0)[0] == 3.0


def test_a_short_run_warms_up_for_at_least_one_step() -> None:
    found = rates(10, lr=3.0, warmup_fraction=0.03)
    assert found[:2] == [3.0, 3.0]
    assert found[2] < 3.0


def test_the_end_is_the_share_of_the_peak() -> None:
    train = TrainConfig(lr=2.0, min_lr_ratio=0.1)
    assert lr_at(1000, 1000, train) == pytest.approx(0.2)
    assert lr_at(999, 1000, train) == pytest.approx(0.2, rel=1e-4)
    assert lr_at(5000, 1000, train) == pytest.approx(0.2)  # a run made shorter after its checkpoint


def test_no_lr_at_all() -> None:
    assert rates(5, lr=0.0) == [0.0] * 5


def test_a_step_depends_on_nothing_before_it() -> None:
    """Resuming needs no state: any step in any order gives the same."""
    train = TrainConfig()
    forward = [lr_at(step, 50, train) for step in range(50)]
    assert [lr_at(step, 50, train) for step in reversed(range(50))] == forward[::-1]
    assert train == TrainConfig()
