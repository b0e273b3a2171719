"""Quantised linear layers: error, memory, reading in parts, and folders that load by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cogvlm_ft.build import load_whole_model
from cogvlm_ft.errors import CheckpointError, ConfigError
from cogvlm_ft.export.quantized import export_quantized
from cogvlm_ft.model import CogVLMForCausalLM, load_model, quantized
from cogvlm_ft.model.quantized import KINDS, QuantizedLinear, normal_levels, stored_tensors

BYTES_PER_WEIGHT = {"int8": 1.25, "int4": 0.9}  # of tiny layers: scales, and rows filled up to blocks of 64
LARGEST_ERROR = {"int8": 0.005, "int4": 0.153}  # of a weight, as a fraction of the largest of its block


@torch.no_grad()
def logits(model: CogVLMForCausalLM) -> Tensor:
    torch.manual_seed(0)
    size, patches = model.config.image_size, model.config.num_patches
    ids = torch.randint(3, model.config.vocab_size, (2, patches + 3 + 6))
    return model(input_ids=ids, pixel_values=torch.randn(2, 3, size, size)).logits.float()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_close_small_and_read_in_parts(
    kind: str, start_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_model(start_model)
    model = load_whole_model(start_model, torch.float32, quantized=kind)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(layers) == sum(type(module) is torch.nn.Linear for module in whole.modules()) - 1, "all but lm_head"
    for name, layer in layers.items():
        true = whole.get_submodule(name).weight
        error = (layer.restored(torch.float32) - true).abs().amax(dim=1) / true.abs().amax(dim=1)
        assert error.max() <= LARGEST_ERROR[kind], name
        num_bytes = sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())
        assert num_bytes <= true.numel() * BYTES_PER_WEIGHT[kind], name
    exact, found = logits(whole), logits(model)
    assert 0 < (found - exact).norm() / exact.norm() < {"int8": 0.025, "int4": 0.4}[kind]

    monkeypatch.setattr(quantized, "ROWS_AT_A_TIME", 7)
    parts = stored_tensors(load_whole_model(start_model, torch.float32, quantized=kind))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in stored_tensors(model).items())

    num_bytes = export_quantized(start_model, tmp_path / "small", kind)
    assert num_bytes == quantized.quantized_bytes(whole, kind, element_bytes=2)
    assert num_bytes < sum(p.numel() * 2 for p in whole.parameters()), "less than bf16"
    again = load_whole_model(tmp_path / "small", torch.bfloat16)
    bf16 = load_whole_model(start_model, torch.bfloat16, quantized=kind)
    assert torch.equal(logits(again), logits(bf16))
    with pytest.raises(CheckpointError, match="quantised weights; expected floats"):
        load_model(tmp_path / "small")
    with pytest.raises(ConfigError, match=f"has {kind} weights"):
        load_whole_model(tmp_path / "small", torch.bfloat16, quantized="int4" if kind == "int8" else "int8")
    with pytest.raises(CheckpointError, match="exists"):
        export_quantized(start_model, tmp_path / "small", kind)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_through_the_restored_weights_also_when_recomputed(kind: str) -> None:
    """The layer equals a plain one with the restored weights, and keeps none of them for its backward pass."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(100, 70)
    layer = KINDS[kind](100, 70, None).to_empty(device="cpu")
    layer.bias = plain.bias
    weights = torch.randn(70, 100)
    layer.read(lambda start, stop: weights[start:stop])
    plain.weight.data = layer.restored(torch.float32)
    given = torch.randn(3, 5, 100)
    found, expected = (given.clone().requires_grad_() for _ in range(2))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        out = layer(found)
    assert not saved
    recomputed = checkpoint(layer, found, use_reentrant=False)
    plain(expected).sin().sum().backward()
    for output in (out, recomputed):
        found.grad = None
        output.sin().sum().backward()
        torch.testing.assert_close(output, plain(expected), atol=1e-5, rtol=0)
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-5, rtol=0)


def test_the_levels_are_those_of_nf4() -> None:
    levels = normal_levels()
    assert levels.tolist()[:2] == pytest.approx([-1, -0.6961928], abs=1e-6) and levels[7] == 0
    assert levels.tolist()[8:10] == pytest.approx([0.0795803, 0.1609302], abs=1e-6) and levels[15] == 1
