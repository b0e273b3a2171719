"""The DeepSpeed JSON that `deepspeed` names: read, freed of "auto", and checked before weights are loaded."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from cogvlm_ft.config import ENGINE_PRESETS, find_preset
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.plain_files import parse_json, read_bytes
from cogvlm_ft.settings import Config

_COMMENT = "//"  # a key of ours, at any depth
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?")
_OWNED = {
    "optimizer": "train.lr, train.beta1, train.beta2 and train.eps",
    "scheduler": "train.lr and train.warmup_fraction",
    "fp16": "train.precision",
    "amp": "train.precision",
}
"""Sections of the file that are not allowed, and the settings to use instead."""


def deepspeed_file(config: Config) -> Path:
    """Return the file that `deepspeed` refers to: a path, or the name of a preset."""
    return find_preset(config.deepspeed, ENGINE_PRESETS, "deepspeed=")


def read_deepspeed_json(config: Config) -> dict[str, Any]:
    """Return the settings in that file, without "auto", null and comments.

    Raises ConfigError if they are unreadable, not for ZeRO-3, unknown to DeepSpeed or set by the config.
    """
    path = deepspeed_file(config)
    try:
        settings = parse_json(read_bytes(path).decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"deepspeed={path}: {error}; expected a DeepSpeed JSON in UTF-8, which has no comments and no comma before "
            "a closing bracket. Correct the file"
        ) from None
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        raise ConfigError(f"deepspeed={path}: found no zero_optimization; expected a DeepSpeed JSON for ZeRO-3")
    zero = _numbers(_without_auto(settings["zero_optimization"]))
    settings = {**_without_auto(settings), "zero_optimization": zero}
    for section, ours in _OWNED.items():
        if section in settings:
            raise ConfigError(f"{path}: found {section}, which is set by {ours}. Remove {section} from the file")
    if zero.get("stage") != 3:
        raise ConfigError(
            f"{path}: zero_optimization.stage: found {zero.get('stage')!r}; expected 3, because model folders are read "
            "into partitioned parameters"
        )
    _check_sections(path, settings)
    return settings


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings without the values "auto" of transformers' Trainer: the config or DeepSpeed's default counts.

    So it does for null. The numbers of ranks of a node, for hpZ, remain to be filled in.
    """
    kept: dict[str, Any] = {}
    for key, value in settings.items():
        if key == _COMMENT or value is None:
            continue
        if isinstance(value, dict):
            if value.get("enabled") == "auto" or (key in ("fp16", "amp") and value.get("enabled") is False):
                continue  # what else it holds has no effect
            inner = _without_auto(value)
            if inner or not value:
                kept[key] = inner
        elif value != "auto" or key == "zero_hpz_partition_size":
            kept[key] = value
    return kept


def _numbers(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with whole numbers for 1e9, "5e8" and "3", which are what DeepSpeed takes for sizes."""
    return {
        key: _numbers(value) if isinstance(value, dict) else _whole_if_possible(value)
        for key, value in settings.items()
    }


def _whole_if_possible(value: Any) -> Any:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value) if re.search(r"[.eE]", value) else int(value)
    return int(value) if isinstance(value, float) and math.isfinite(value) and value.is_integer() else value


def _check_sections(path: Path, settings: dict[str, Any]) -> None:
    """Raise ConfigError for what DeepSpeed would refuse with a traceback, or what checkpoints cannot hold."""
    zero = settings["zero_optimization"]
    known = {**zero, "zero_hpz_partition_size": 1} if zero.get("zero_hpz_partition_size") == "auto" else zero
    try:
        DeepSpeedZeroConfig(**known)
    except ValidationError as error:
        first = error.errors()[0]
        key, found = ".".join(map(str, first["loc"])), f"{first['input']!r:.80}"
        expected = first["msg"].replace("Input should be", "expected")
        if first["type"] == "extra_forbidden":
            found, expected = "a key unknown to this DeepSpeed", "expected a documented one"
        raise ConfigError(f"{path}: zero_optimization.{key}: found {found}; {expected}. Correct or remove it") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: zero_optimization: {str(error).splitlines()[0]}. Correct the file") from None
    for key, today in (("cpu_offload", "offload_optimizer"), ("cpu_offload_params", "offload_param")):
        if zero.get(key):
            raise ConfigError(
                f"{path}: zero_optimization.{key}: found {zero[key]!r}, the form of earlier versions; expected "
                f'"{today}": {{"device": "cpu"}}. Replace it'
            )
    for key in ("offload_optimizer", "offload_param"):
        device = zero.get(key, {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise ConfigError(
                f"{path}: zero_optimization.{key}.device: found {device!r}; expected cpu or none, because checkpoints "
                "are written from memory"
            )
    if not isinstance(settings.get("data_types", {}), dict):
        raise ConfigError(
            f'{path}: data_types: found {settings["data_types"]!r:.80}; expected {{"grad_accum_dtype": "fp32"}}. '
            "Correct or remove it"
        )
