"""LoRA adapters of the peft package, put into the model in place: names, modules and calls stay those of CogVLM."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cogvlm_ft.settings import AdapterConfig

_LAYER, _TOWER = r"model\.layers\.\d+\.", r"model\.vision\.transformer\.layers\.\d+\."
TARGETS = {
    "attention.language": _LAYER + r"self_attn\.language_expert_(query_key_value|dense)",
    "attention.vision_expert": _LAYER + r"self_attn\.vision_expert_(query_key_value|dense)",
    "mlp.language": _LAYER + r"mlp\.language_mlp\.(gate|up|down)_proj",
    "mlp.vision_expert": _LAYER + r"mlp\.vision_mlp\.(gate|up|down)_proj",
    "vision": _TOWER + r"(attention\.(query_key_value|dense)|mlp\.fc[12])",
    "bridge": r"model\.vision\.linear_proj\.(linear_proj|dense_h_to_4h|gate_proj|dense_4h_to_h)",
}
"""Groups of `adapter.targets`, as patterns of whole module names."""
FULL = {"bridge": "model.vision.linear_proj"}
"""Parts of `adapter.full`: modules that are trained in full."""
FACTORS = ("lora_A", "lora_B")
_NAME = "default"  # peft's, of a model's first adapter
_PEFT_PREFIX = "base_model.model."


def peft_config(adapter: AdapterConfig, base: str) -> Any:
    """Return peft's LoraConfig. base: the model that it belongs to, as peft records it."""
    from peft import LoraConfig  # takes seconds: only runs with adapters wait for it

    return LoraConfig(
        r=adapter.rank or 0,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # it only divides; a fraction is right too
        lora_dropout=adapter.dropout,
        target_modules="|".join(f"({TARGETS[name]})" for name in adapter.targets),
        modules_to_save=[FULL[name].removeprefix("model.") for name in adapter.full] or None,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    )


def add_adapters(model: nn.Module, adapter: AdapterConfig, seed: int) -> None:
    """Put adapters into the model, and train nothing but them and `adapter.full`.

    The first factor of each is random, the second is zero. The weights of the model may be partitioned by ZeRO-3; those
    of the adapters are whole.
    """
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(peft_config(replace(adapter, full=[]), ""), model, _NAME)
    for name, parameter in model.named_parameters():
        if is_in_full(name, adapter.full):
            parameter.requires_grad_(True)


def is_adapter(name: str) -> bool:
    """Return whether a parameter is part of an adapter."""
    return any(f".{factor}." in name for factor in FACTORS)


def is_in_full(name: str, full: Iterable[str]) -> bool:
    """Return whether a parameter is in one of the parts of `adapter.full`."""
    return name.startswith(tuple(f"{FULL[part]}." for part in full))


def of_base(parameters: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return the parameters of the model under its adapters, by their published names."""
    return {name.replace(".base_layer.", "."): value for name, value in parameters if not is_adapter(name)}


def factor_name(weight: str, factor: str, adapter: str = _NAME) -> str:
    """Return the parameter name of one of `FACTORS` beside a weight of the published name."""
    return f"{weight.removesuffix('.weight')}.{factor}.{adapter}.weight"


def choose_adapter(model: nn.Module, name: str | None) -> None:
    """Let the model compute with the adapters of this name alone; None: without any."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(name is not None)
            if name is not None:
                module.set_adapter([name] if name in module.lora_A else [])  # type: ignore[operator]


def name_in_peft_file(name: str) -> str:
    """Return the name that peft gives a parameter of an adapter, or of a part in full, in its files."""
    return f"{_PEFT_PREFIX}{name.replace(f'.{_NAME}.', '.')}"


def name_from_peft_file(name: str) -> str:
    """Return the parameter name of a tensor in a file of peft."""
    for factor in FACTORS:
        name = name.replace(f".{factor}.weight", f".{factor}.{_NAME}.weight")
    return name.removeprefix(_PEFT_PREFIX)


def checkpointed(parameters: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return what a checkpoint holds: of a model with adapters these and what else is trained, else all parameters."""
    found = dict(parameters)
    if not any(map(is_adapter, found)):
        return found
    return {name: parameter for name, parameter in found.items() if is_adapter(name) or parameter.requires_grad}
