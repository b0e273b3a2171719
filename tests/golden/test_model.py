"""Parity with the reference implementation: outputs, losses, gradients and generated ids of tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_cases import case_dirs
from safetensors.torch import load_file

from cogvlm_ft.model import CogVLMForCausalLM, enable_gradient_checkpointing, load_model
from cogvlm_ft.model.loading import interpolate_position_embedding

FORWARD_CASES = case_dirs(
    lambda name: not name.startswith("gqa"), needs="golden.safetensors", without="out.generated_ids"
)
GENERATE_CASES = case_dirs(
    lambda name: not name.startswith("gqa"), needs="golden.safetensors", having="out.generated_ids"
)


def load_case(case: Path) -> tuple[CogVLMForCausalLM, dict[str, torch.Tensor]]:
    tensors = load_file(case / "golden.safetensors")
    hires = case / "config_hires.json"
    size = json.loads(hires.read_text())["vision_config"]["image_size"] if hires.exists() else None
    return load_model(case, image_size=size), tensors


def model_inputs(tensors: dict[str, torch.Tensor]) -> dict:
    per_row = tensors["in.images_per_row"].tolist() if "in.images_per_row" in tensors else None
    images = iter(tensors.get("in.images", []))
    rows = [[next(images) for _ in range(n)] for n in per_row] if per_row else None
    return {
        "input_ids": tensors["in.input_ids"],
        "token_type_ids": tensors["in.token_type_ids"],
        "attention_mask": tensors["in.attention_mask"],
        "images": rows,
    }


def record_outputs(model: CogVLMForCausalLM) -> dict[str, torch.Tensor]:
    """Register forward hooks under the names of the golden files; the next pass fills the dict."""
    seen: dict[str, torch.Tensor] = {}

    def keep(module: torch.nn.Module, name: str) -> None:
        def hook(_module: torch.nn.Module, _args: tuple, out: torch.Tensor) -> None:
            seen.setdefault(name, out.detach())

        module.register_forward_hook(hook)

    def keep_input(_module: torch.nn.Module, args: tuple) -> None:
        seen.setdefault("out.lm.inputs_embeds", args[0].detach())

    vision, lm = model.model.vision, model.model
    keep(vision.patch_embedding, "out.vision.patch_embedding")
    keep(vision.linear_proj, "out.vision.adaptor")
    keep(vision, "out.vision.output")
    keep(lm.norm, "out.lm.norm")
    for i, layer in enumerate(vision.transformer.layers):
        keep(layer, f"out.vision.layer.{i}")
    for i, layer in enumerate(lm.layers):
        keep(layer, f"out.lm.layer.{i}")
        keep(layer.self_attn, f"out.lm.layer.{i}.attn")
        keep(layer.mlp, f"out.lm.layer.{i}.mlp")
    lm.layers[0].register_forward_pre_hook(keep_input)
    return seen


def assert_outputs_equal(seen: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> int:
    real = tensors["in.attention_mask"].bool()
    compared = 0
    for name, wanted in tensors.items():
        if not name.startswith(("out.vision.", "out.lm.", "out.logits")):
            continue
        found = seen[name]
        if name.startswith("out.lm") or name == "out.logits":
            found, wanted = found[real], wanted[real]
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
        compared += 1
    return compared


@pytest.mark.parametrize("case", FORWARD_CASES, ids=lambda p: p.name)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_outputs_loss_and_gradients(case: Path, checkpointing: bool) -> None:
    model, tensors = load_case(case)
    model.train()
    if checkpointing:
        enable_gradient_checkpointing(model)
    seen = record_outputs(model)
    out = model(**model_inputs(tensors), labels=tensors["in.labels"])
    seen["out.logits"] = out.logits.detach()
    assert assert_outputs_equal(seen, tensors) >= 9
    torch.testing.assert_close(out.loss.detach(), tensors["out.loss"], atol=1e-5, rtol=0)

    out.loss.backward()
    parameters = dict(model.named_parameters())
    gradients = [name for name in tensors if name.startswith("grad.")]
    assert len(gradients) >= 4
    for name in gradients:
        wanted, found = tensors[name], parameters[name.removeprefix("grad.")].grad
        assert found is not None, name
        assert (found - wanted).abs().max() <= 1e-3 * wanted.abs().max().clamp(min=1e-12), name
    for name in json.loads((case / "golden.json").read_text()).get("grad_none", []):
        assert parameters[name].grad is None, name


@pytest.mark.parametrize("case", FORWARD_CASES, ids=lambda p: p.name)
def test_loss_on_labelled_positions_only_is_the_same(case: Path) -> None:
    model, tensors = load_case(case)
    out = model(**model_inputs(tensors), labels=tensors["in.labels"], return_logits=False)
    assert out.logits is None
    torch.testing.assert_close(out.loss.detach(), tensors["out.loss"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", FORWARD_CASES + GENERATE_CASES, ids=lambda p: p.name)
def test_position_ids_and_expert_mask(case: Path) -> None:
    from cogvlm_ft.model.layout import build_position_ids, vision_expert_mask

    tensors = load_file(case / "golden.safetensors")
    real = tensors["in.attention_mask"].bool()
    found = build_position_ids(tensors["in.token_type_ids"], tensors["in.attention_mask"])
    assert torch.equal(found[real], tensors["in.position_ids"][real])
    assert torch.equal(vision_expert_mask(tensors["in.token_type_ids"]), tensors["out.vision_expert_mask"])


@pytest.mark.parametrize("case", GENERATE_CASES, ids=lambda p: p.name)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
def test_generate(case: Path, use_cache: bool) -> None:
    model, tensors = load_case(case)
    inputs = model_inputs(tensors)
    wanted = tensors["out.generated_ids"]
    seen = record_outputs(model)
    ids = model.generate(
        **inputs, max_new_tokens=wanted.shape[1], min_new_tokens=wanted.shape[1], do_sample=False, use_cache=use_cache
    )
    assert torch.equal(ids[:, inputs["input_ids"].shape[1] :], wanted)
    tensors.pop("out.logits", None)
    assert assert_outputs_equal(seen, tensors) >= 10


@pytest.mark.parametrize("case", GENERATE_CASES, ids=lambda p: p.name)
def test_step_logits_by_hand(case: Path) -> None:
    """The published calling convention: prompt with images, then one token and its position id at a time."""
    model, tensors = load_case(case)
    inputs = model_inputs(tensors)
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        num_steps = tensors["out.step_logits"].shape[1]
        for step in range(num_steps):
            torch.testing.assert_close(out.logits[:, -1], tensors["out.step_logits"][:, step], atol=1e-4, rtol=0)
            if step == num_steps - 1:
                break
            token = tensors["out.generated_ids"][:, step : step + 1]
            mask = inputs["attention_mask"]
            inputs["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            out = model(
                input_ids=token,
                attention_mask=inputs["attention_mask"],
                position_ids=tensors["out.decode_position_ids"][:, step + 1 : step + 2],
                past_key_values=out.past_key_values,
                use_cache=True,
            )


HIRES_CASES = case_dirs(lambda name: name == "hires", needs="golden.safetensors")


@pytest.mark.skipif(not HIRES_CASES, reason="the hires case is only in the full set of golden cases")
def test_position_table_interpolation() -> None:
    for case in HIRES_CASES:
        tensors = load_file(case / "golden.safetensors")
        found = interpolate_position_embedding(tensors["in.pos_16x16"], 35 * 35 + 1)
        torch.testing.assert_close(found, tensors["out.pos_35x35"], atol=1e-5, rtol=0)
