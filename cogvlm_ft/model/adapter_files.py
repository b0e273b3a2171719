"""Adapters in the files of peft, loaded beside each other for inference and chosen by name."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.model.adapters import FACTORS


def load_adapter(model: nn.Module, folder: Path, name: str) -> None:
    """Put the adapters of a folder of peft into the model, beside others of different names, for inference.

    Raises CheckpointError if they do not fit the model.
    """
    from peft import PeftConfig, inject_adapter_in_model
    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = PeftConfig.from_pretrained(str(folder))
        factors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        what = f"expected adapter_config.json and {SAFETENSORS_WEIGHTS_NAME} of peft"
        raise CheckpointError(f"{folder}: {error}; {what}. Give a folder of launch/export.py --adapter") from None
    config.inference_mode = True
    try:
        inject_adapter_in_model(config, model, name)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}; expected adapters of this model. Choose others") from None
    own = [f".{factor}.{name}." for factor in FACTORS]
    places = {key: value for key, value in model.named_parameters() if any(part in key for part in own)}
    found = {_name_in_model(key, name): value for key, value in factors.items()}
    wrong = sorted(places.keys() ^ found.keys())
    wrong += [key for key in places.keys() & found.keys() if places[key].shape != found[key].shape]
    if wrong:
        raise CheckpointError(
            f"{folder}: found {len(wrong)} tensors that do not fit, such as {wrong[0]}; expected adapters of this "
            "model. Choose its base, or other adapters"
        )
    for key, value in found.items():
        places[key].data.copy_(value)


def _name_in_model(key: str, name: str) -> str:
    for factor in FACTORS:
        key = key.replace(f".{factor}.weight", f".{factor}.{name}.weight")
    return key.removeprefix("base_model.model.")


def choose_adapter(model: nn.Module, name: str | None) -> None:
    """Let the model compute with the adapters of this name alone; None: without any."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(name is not None)
            if name is not None:
                module.set_adapter([name] if name in module.lora_A else [])  # type: ignore[operator]
