"""Compare one language and one vision layer of the 17B model with float64 on CPU in every precision; list kernels."""

from __future__ import annotations

from typing import Any

import gpu_speed
import torch
from gpu_lines import Line, at_most, relative_error
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from cogvlm_ft.model import CogVLMConfig, CogVLMForCausalLM

# Relative error of outputs and gradients: some roundings of 24, 11 and 8 bits of mantissa, one after the other.
LIMITS = {"fp32": 2e-5, "tf32": 1e-2, "bf16": 5e-2}
ATTENTION = ("attention", "attn", "fmha", "flash")  # in the names of its operations and kernels
WATCHED = ("lm_head.weight", "model.layers.0.self_attn.vision_expert_query_key_value.weight")
WATCHED_VISION = ("model.vision.transformer.layers.0.mlp.fc1.weight",)


def compare_layers(setup: Any) -> list[Line]:
    """Compare the loss and gradients at the end, in the middle and at the start of the backward pass."""
    config = gpu_speed.tiny_config() if setup.tiny else CogVLMConfig(vocab_size=2000, template_version="base")
    config.num_hidden_layers = config.vision["num_hidden_layers"] = 1
    config = config.at_image_size(56 if setup.tiny else 490)
    # Values that all precisions can hold: the difference is that of the computation.
    exact = gpu_speed.build_model(config, torch.device("cpu"), torch.bfloat16).double()
    batch = gpu_speed.batch_of(config, 4)
    batch.pixel_values.copy_(batch.pixel_values.bfloat16().float())
    expected, _ = passes(exact, batch)
    lines = []
    for precision, dtype in gpu_speed.DTYPES.items():
        with gpu_speed.math_of(precision):
            model = nn.Module.to(CogVLMForCausalLM(config), dtype)
            model.load_state_dict(exact.state_dict())
            found, kernels = passes(nn.Module.to(model, setup.device), batch.to(torch.device(setup.device)))
        errors = {name: relative_error(found[name], value) for name, value in expected.items()}
        worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
        lines.append(at_most(f"{precision}: error of {worst}", errors[worst], LIMITS[precision]))
        attention = sorted(name for name in kernels if any(part in name for part in ATTENTION))
        is_fast = bool(attention) and not any("math" in name for name in attention)
        lines.append(Line(f"{precision}: attention without the math kernel", is_fast, ", ".join(attention)[:400]))
    return lines


def passes(model: Any, batch: Any) -> tuple[dict[str, Tensor], set[str]]:
    """Return the loss and some gradients, and the names of all operations and kernels."""
    device = next(model.parameters()).device.type
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiled:
        loss = model(
            input_ids=batch.input_ids,
            pixel_values=batch.pixel_values.to(model.dtype),
            position_ids=batch.position_ids,
            block_ids=batch.block_ids,
            labels=batch.labels,
            return_logits=False,
        ).loss
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
    parameters = dict(model.named_parameters())
    gradients = {name: parameters[name].grad for name in (*WATCHED, *WATCHED_VISION)}
    return {"loss": loss, **gradients}, {event.key for event in profiled.key_averages()}
