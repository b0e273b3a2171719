"""Operations of a step from its tokens are those that are counted module by module."""

from __future__ import annotations

import pytest
import torch

from cogvlm_ft.model import CogVLMForCausalLM
from cogvlm_ft.planning.activations import MicroBatchShape
from cogvlm_ft.planning.flops import PEAK_TFLOPS, StepFlops, step_flops
from cogvlm_ft.planning.step_time import count_flops
from cogvlm_ft.runtime.distributed import device
from cogvlm_ft.settings import Config, ModelConfig
from cogvlm_ft.train.meter import Meter
from cogvlm_ft.train.step import StepStats


@pytest.fixture
def flops(tiny_model: CogVLMForCausalLM) -> StepFlops:
    return step_flops(Config(model=ModelConfig(gradient_checkpointing="all")), tiny_model.config)


@pytest.mark.parametrize(("images", "turns", "turn_tokens", "labelled"), [(1, 1, 0, 0), (1, 1, 40, 7), (6, 5, 33, 12)])
def test_the_sum_of_the_parts_is_the_count(
    flops: StepFlops, tiny_model: CogVLMForCausalLM, images: int, turns: int, turn_tokens: int, labelled: int
) -> None:
    size = MicroBatchShape(num_images=images, turns=turns, turn_tokens=turn_tokens, labelled_tokens=labelled)
    num_turns, prefix = images * turns, tiny_model.config.num_patches + 3
    found = flops.of(images, num_turns, images * prefix + num_turns * turn_tokens, num_turns * labelled)
    assert found == pytest.approx(3 * count_flops(tiny_model, size)[0], rel=1e-9)


def test_two_operations_per_weight_and_token_are_most_of_it(flops: StepFlops, tiny_model: CogVLMForCausalLM) -> None:
    """A text token passes the language expert's matrices of every layer, forward once and backward twice."""
    layers = tiny_model.model.layers
    weights = sum(p.numel() for n, p in layers.named_parameters() if p.ndim == 2 and "vision_" not in n)
    assert flops.text_token == pytest.approx(6 * weights, rel=1e-6)
    assert flops.labelled_token == pytest.approx(6 * tiny_model.lm_head.weight.numel(), rel=1e-6)


def test_the_meter_reports_operations_per_second(flops: StepFlops) -> None:
    meter = Meter(flops)
    one = {"loss_sum": torch.tensor(2.0), "row_losses": torch.tensor([2.0]), "num_target_tokens": 10, "num_images": 1}
    one |= {"num_turns": 2, "num_tokens": flops.prefix + 60, "num_bad": 0, "num_cut_boxes": 0, "grad_norm": 1.0}
    for step_s in (0.5, 1.0):
        meter.add(StepStats(**one, step_s=step_s), data_wait_s=0.25)
    found = meter.report().values
    assert found["tflops"] == pytest.approx(2 * flops.of(1, 2, flops.prefix + 60, 10) / 2.0 / 1e12)
    assert found["data_wait_fraction"] == pytest.approx(0.25)
    assert ("mfu" in found) == (flops.peak is not None) and "cross_entropy" not in found


def test_the_meter_reports_the_cross_entropy_beside_a_loss_that_holds_more(flops: StepFlops) -> None:
    meter = Meter(flops, has_box_loss=True)
    one = {"num_images": 1, "num_turns": 2, "num_tokens": 60, "num_bad": 0, "num_cut_boxes": 0, "grad_norm": 1.0}
    for loss, entropy, skipped in ((2.0, 1.5, False), (4.0, 2.5, False), (float("nan"), float("nan"), True)):
        rows = {"loss_sum": torch.tensor(loss), "row_losses": torch.tensor([entropy - 1, 1.0]), "num_target_tokens": 10}
        meter.add(StepStats(**one, **rows, is_skipped=skipped, step_s=0.5), data_wait_s=0.0)
    found = meter.report().values
    assert (found["loss"], found["cross_entropy"]) == (pytest.approx(0.3), pytest.approx(0.2))


def test_the_share_of_the_peak(flops: StepFlops) -> None:
    known = StepFlops(1.0, 1.0, 1.0, 1.0, 3, peak=PEAK_TFLOPS["H100"]["bf16"] * 1e12)
    assert known.rates(989e12, seconds=2.0) == {"tflops": 494.5, "mfu": 0.5}
    if device().type != "cuda":
        assert flops.peak is None and "mfu" not in flops.rates(1e9, 1.0)
