"""Adapters in the files of the peft package: read, compared with the model they are for, and put into it.

adapter_config.json, adapter_model.safetensors    as peft writes them
base.json                                         of an export of ours: name and fingerprint of the model under them
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.model.adapters import FACTORS, factor_name, is_adapter, name_from_peft_file
from cogvlm_ft.model.fingerprint import fingerprint
from cogvlm_ft.model.loading import Assign, FileTensor, check_floats, open_file, read_whole
from cogvlm_ft.plain_files import read_json
from cogvlm_ft.settings import AdapterConfig

CONFIG_FILE, WEIGHTS_FILE, BASE_FILE = "adapter_config.json", "adapter_model.safetensors", "base.json"
_PLAIN = {"use_dora": (False, None), "use_rslora": (False, None), "bias": ("none", None), "lora_bias": (False, None)}
_PLAIN |= {"rank_pattern": ({}, None), "alpha_pattern": ({}, None), "fan_in_fan_out": (False, None)}
"""Options of peft, and their values with which an adapter is alpha / rank x B A."""


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter in files. tensors: by parameter name, factors and parts in full."""

    folder: Path
    rank: int
    alpha: float
    tensors: Mapping[str, FileTensor]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def is_peft_folder(folder: Path) -> bool:
    """Return whether a folder holds an adapter in the files of peft."""
    return (folder / CONFIG_FILE).is_file()


def open_peft_adapter(folder: Path, base: Path, parameters: Mapping[str, tuple[int, ...]]) -> PeftAdapter:
    """Open an adapter for the model folder `base`, whose parameters have these shapes. Raises CheckpointError.

    It is refused if it is not plain LoRA, if its export names another base, or if a tensor does not fit a weight.
    """
    try:
        settings = dict(read_json(folder / CONFIG_FILE))
        rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
        stored = open_file(folder / WEIGHTS_FILE)
        if rank < 1 or not math.isfinite(alpha):
            raise ValueError(f"r={rank}, lora_alpha={alpha}: expected numbers, and a rank of 1 or more")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: {error!r}; expected {CONFIG_FILE} and {WEIGHTS_FILE} of peft") from None
    unusual = [key for key, plain in _PLAIN.items() if key in settings and settings[key] not in plain]
    if settings.get("peft_type") != "LORA" or unusual:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: found {settings.get('peft_type')}{' with ' if unusual else ''}"
            f"{', '.join(unusual)}; expected plain LORA. Merge it with peft, and use the merged model"
        )
    _check_base(folder, base)
    check_floats(folder, {name: tensor.dtype for name, tensor in stored.items()})
    tensors = {name_from_peft_file(name): tensor for name, tensor in stored.items()}
    if len(tensors) < len(stored):
        raise CheckpointError(f"{folder / WEIGHTS_FILE}: found two tensors for one weight; expected one")
    _check_shapes(folder, base, rank, tensors, parameters)
    return PeftAdapter(folder, rank, alpha, tensors)


def _check_base(folder: Path, base: Path) -> None:
    if not (folder / BASE_FILE).is_file():
        return  # of another program: names and shapes of the tensors are compared
    try:
        expected = dict(read_json(folder / BASE_FILE))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / BASE_FILE}: {error!r}; expected the file of an export") from None
    found = fingerprint(base)
    if found != expected.get("sha256"):
        raise CheckpointError(
            f"{folder}: found {base} with fingerprint {found[:12]} as its base; expected {expected.get('name')} with "
            f"{str(expected.get('sha256'))[:12]}, on which it was trained. Use that model"
        )


def _check_shapes(
    folder: Path, base: Path, rank: int, tensors: Mapping[str, FileTensor], parameters: Mapping[str, tuple[int, ...]]
) -> None:
    expected = dict(parameters)
    for name, shape in parameters.items():
        if name.endswith(".weight") and len(shape) == 2:
            inner, outer = (factor_name(name, factor) for factor in FACTORS)
            expected |= {inner: (rank, shape[1]), outer: (shape[0], rank)}
    wrong = [name for name, tensor in tensors.items() if tuple(tensor.shape) != expected.get(name)]
    halves = {factor_name(_weight_of(name), factor) for name in tensors if is_adapter(name) for factor in FACTORS}
    wrong += sorted(halves - tensors.keys())
    if wrong or not halves:
        what = f"{wrong[0]} {list(tensors[wrong[0]].shape) if wrong[0] in tensors else 'missing'}" if wrong else "none"
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: {len(wrong)} tensors do not fit {base}: found {what}; expected factors of rank "
            f"{rank} for its weights. Use the model that the adapter was trained on"
        )


def _weight_of(factor: str) -> str:
    return factor.partition(".lora_")[0] + ".weight"


def put_into(model: nn.Module, adapter: PeftAdapter, settings: AdapterConfig, assign: Assign) -> None:
    """Overwrite the adapters of a model, which are whole, and its parts in full. Raises CheckpointError.

    assign: stores a parameter that is not an adapter and may be partitioned, as `load_weights` calls it.
    """
    parameters = dict(model.named_parameters())
    ours = {name for name, value in parameters.items() if is_adapter(name) or value.requires_grad}
    for key, found, expected in (
        ("rank", settings.rank, adapter.rank),
        ("alpha", settings.alpha, adapter.alpha),
    ):
        if found != expected:
            raise CheckpointError(
                f"adapter.{key}: found {found}; expected {expected:g}, as in {adapter.folder}. Set it"
            )
    if ours != adapter.tensors.keys():
        missing, other = sorted(ours - adapter.tensors.keys()), sorted(adapter.tensors.keys() - ours)
        raise CheckpointError(
            f"adapter.targets, adapter.full: {adapter.folder} holds {len(other)} tensors for other parts"
            f"{_first(other)}, and lacks {len(missing)} of these{_first(missing)}; expected the parts that it was "
            "trained on. Set adapter.targets and adapter.full to them"
        )
    for name, tensor in adapter.tensors.items():
        if is_adapter(name):
            parameters[name].data.copy_(read_whole(tensor, torch.float32))
        else:
            whole = read_whole(tensor, torch.float32)
            assign(name, lambda start, stop, rows=whole: rows[start:stop], tensor.shape[0])  # type: ignore[misc]


def put_beside(model: nn.Module, adapter: PeftAdapter, name: str) -> None:
    """Put an adapter into a whole model for inference, beside others of different names. Raises CheckpointError.

    `choose_adapter` decides which one the model computes with.
    """
    from peft import PeftConfig, inject_adapter_in_model

    in_full = [each for each in adapter.tensors if not is_adapter(each)]
    if in_full:
        raise CheckpointError(
            f"{adapter.folder}: holds {len(in_full)} parts in full{_first(in_full)}; expected adapters alone, which "
            "share a model. Merge it: launch/export.py --base"
        )
    config = PeftConfig.from_pretrained(str(adapter.folder))
    config.inference_mode = True
    inject_adapter_in_model(config, model, name)
    parameters = dict(model.named_parameters())
    weights = sorted({_weight_of(each) for each in adapter.tensors})
    places = {(weight, factor): factor_name(weight, factor, name) for weight in weights for factor in FACTORS}
    made = {each for each in parameters if any(f".{factor}.{name}." in each for factor in FACTORS)}
    wrong = made ^ set(places.values())
    if wrong:
        raise CheckpointError(
            f"{adapter.folder}: {len(wrong)} tensors{_first(sorted(wrong))} are in one of {CONFIG_FILE} and "
            f"{WEIGHTS_FILE} only; expected both of one adapter. Export it again"
        )
    for (weight, factor), place in places.items():
        parameters[place].data.copy_(read_whole(adapter.tensors[factor_name(weight, factor)], torch.float32))


def _first(names: list[str]) -> str:
    return f" (such as {names[0]})" if names else ""
