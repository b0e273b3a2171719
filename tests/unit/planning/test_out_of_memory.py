"""Explanations when memory runs out: the estimate, and a setting that would have fitted."""

from __future__ import annotations

import re

import pytest
import torch

from cogvlm_ft.model import CogVLMForCausalLM
from cogvlm_ft.planning.activations import MicroBatchShape
from cogvlm_ft.planning.memory import GIB, Cluster, Planner
from cogvlm_ft.planning.out_of_memory import explain_out_of_memory, is_out_of_memory, memory_limit
from cogvlm_ft.settings import Config, ModelConfig, TrainConfig

PRESET = "configs/deepspeed/zero3_tiny.json"


def config_of(micro_batch_size: int, precision: str = "fp32") -> Config:
    train = TrainConfig(micro_batch_size=micro_batch_size, global_batch_size=512, precision=precision)
    return Config(deepspeed=PRESET, train=train, model=ModelConfig(path="m", gradient_checkpointing="all"))


def cluster_of(gpu_gib: float) -> Cluster:
    return Cluster(num_nodes=1, gpus_per_node=1, gpu_gib=gpu_gib, reserved_bytes=0, on_cpu=True)


def one_turn(config: Config) -> MicroBatchShape:
    return MicroBatchShape(num_images=config.train.micro_batch_size, turns=1)


def peak_gib(config: Config, model: CogVLMForCausalLM) -> float:
    return max(Planner(config, model.config, cluster_of(1)).estimate(one_turn(config)).peaks.values()) / GIB


@pytest.mark.slow
def test_a_smaller_micro_batch_is_named_where_it_would_have_fitted(tiny_model: CogVLMForCausalLM) -> None:
    config = config_of(256)
    small, large = peak_gib(config_of(32), tiny_model), peak_gib(config, tiny_model)
    text = explain_out_of_memory(
        "OutOfMemoryError: x", config, tiny_model.config, cluster_of((small + large) / 2), one_turn(config)
    )
    assert text.startswith("rank 0 ran out of memory (OutOfMemoryError: x). Estimate of launch/plan.py: training")
    assert f"takes {large:.1f} GiB of a rank (" in text
    [largest] = re.findall(r"What would fit: train\.micro_batch_size=(\d+)", text)
    assert 32 <= int(largest) < 256
    assert peak_gib(config_of(int(largest)), tiny_model) < (small + large) / 2


@pytest.mark.slow
def test_what_takes_less_is_named_where_it_should_have_fitted(tiny_model: CogVLMForCausalLM) -> None:
    config = config_of(64)
    text = explain_out_of_memory(
        "MemoryError: no details", config, tiny_model.config, cluster_of(500), one_turn(config)
    )
    assert "So it should fit with 1 short turns per image" in text
    peak, less = re.findall(r"train\.micro_batch_size=1 \((\S+) -> (\S+) GiB\)", text)[0]
    assert float(less) < float(peak)


@pytest.mark.slow
def test_no_setting_that_fits(tiny_model: CogVLMForCausalLM) -> None:
    config = config_of(1, "bf16")
    text = explain_out_of_memory("x", config, tiny_model.config, cluster_of(1e-6), one_turn(config))
    assert "What would fit" not in text and text.endswith("more GPUs")


def test_real_errors_are_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as without:
        bytearray(1 << 60)
    assert is_out_of_memory(without.value)
    with pytest.raises(RuntimeError) as other:
        torch.zeros(2) @ torch.zeros(3)
    assert not is_out_of_memory(other.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later", 2), True),
        (torch.distributed.DistBackendError("NCCL error ...\nCuda failure 2 'out of memory'"), True),
        (torch.distributed.DistBackendError("Last error:\nFailed to CUDA calloc async 608 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700), False),
        (torch.distributed.DistBackendError("NCCL error: unhandled system error"), False),
    ],
)
def test_errors_of_pinned_memory_and_nccl(error: RuntimeError, is_memory: bool) -> None:
    assert is_out_of_memory(error) == is_memory


def test_there_is_a_limit_here() -> None:
    assert 2**28 < memory_limit() < 2**50
