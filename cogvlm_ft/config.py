"""A config from defaults, a YAML file and `key=value` on the command line, checked by the rules of its fields."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.settings import CHECKPOINTED_LAYERS, Config, Rules

PACKAGE = Path(__file__).resolve().parent  # holds configs/ and slurm/, in a checkout by links
RUN_PRESETS, ENGINE_PRESETS = "configs/*.yaml", "configs/deepspeed/*.json"
RESOLVER = re.compile(r"\$\{\s*[\w.]+\s*:")


def find_preset(given: str | Path, presets: str, key: str) -> Path:
    """Return the file at a path if it exists, else the packaged preset of that name or relative path.

    presets: a glob within the package. key: the setting or option, for the ConfigError that lists the names.
    """
    path = Path(given).expanduser()
    if path.is_file():
        return path
    packaged = sorted(PACKAGE.glob(presets))
    for file in packaged:
        if str(given) in (file.stem, file.relative_to(PACKAGE).as_posix()):
            return file
    names = ", ".join(file.stem for file in packaged)
    raise ConfigError(f"{key}{given}: no such file or preset; expected a path or one of {names}")


def num_accum_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Return the micro-batches per optimizer step of one rank; ConfigError where the sizes do not divide."""
    per_pass = world_size * micro_batch_size
    if global_batch_size % per_pass:
        below = global_batch_size // per_pass * per_pass
        nearest = " or ".join(str(size) for size in (below, below + per_pass) if size)
        raise ConfigError(
            f"train.global_batch_size: {global_batch_size} is not a multiple of {world_size} ranks x "
            f"train.micro_batch_size={micro_batch_size}; expected {nearest}"
        )
    return global_batch_size // per_pass


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Merge defaults, YAML (a path or the name of a preset) and overrides.

    Raises ConfigError with the source, the key and, for a mistyped one, the nearest.
    """
    merged = OmegaConf.structured(Config)
    if path is not None:
        file = find_preset(path, RUN_PRESETS, "--config ")
        merged = _merge(merged, lambda: OmegaConf.load(file), f"--config {path}")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(
                f"{override!r} on the command line: settings are written key=value, such as train.lr=1e-5"
            )
        merged = _merge(
            merged, lambda override=override: OmegaConf.from_dotlist([override]), f"command line {override}"
        )
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"no value for {', '.join(missing)}: set it in the YAML file or as {missing[0]}=...")
        config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    _check(config)
    _refuse_commands(config, overrides)
    return config


def _merge(base: Any, load: Any, source: str) -> Any:
    try:
        loaded = load()
        _refuse_resolvers(OmegaConf.to_container(loaded, resolve=False), source)
        return OmegaConf.merge(base, loaded)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        key = getattr(error, "full_key", None)
        first_line = str(error).splitlines()[0]
        raise ConfigError(f"{source}: {f'{key}: ' if key else ''}{first_line}") from error
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"{source}: not valid YAML: {error}") from error
        raise


def _refuse_resolvers(value: Any, source: str) -> None:
    """Raise ConfigError for `${oc.env:NAME}` and the like: a foreign config could read a key from the environment."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for part in value:
            _refuse_resolvers(part, source)
    elif isinstance(value, str) and RESOLVER.search(value):
        raise ConfigError(
            f"{source}: {value}: environment variables and other resolvers are not expanded; expected a plain value, "
            "or another setting such as ${train.lr}"
        )


def _refuse_commands(config: Config, overrides: Sequence[str]) -> None:
    """Raise ConfigError for shards that are a command (`pipe:`) unless they are typed on the command line."""
    typed = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)), resolve=False)
    data = typed.get("data") if isinstance(typed, dict) else None
    for name in ("shards", "val_shards"):
        value = getattr(config.data, name)
        if _has_command(value) and not (isinstance(data, dict) and data.get(name) == value):
            raise ConfigError(
                f"data.{name}: found a command (pipe:) in a config file; expected it on the command line only, because "
                f"it is run. Type data.{name}=pipe:... after the program's name"
            )


def _has_command(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_command, (*value.keys(), *value.values())))
    if isinstance(value, list):
        return any(map(_has_command, value))
    return isinstance(value, str) and value.strip().startswith("pipe:")


def settings_of(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Rules]]:
    """Yield (dotted key, value, rules) of every setting of a config or a part of it."""
    for each in fields(section):
        value = getattr(section, each.name)
        if is_dataclass(value):
            yield from settings_of(value, f"{prefix}{each.name}.")
        else:
            yield f"{prefix}{each.name}", value, each.metadata["rules"]


def _check(config: Config) -> None:
    for key, value, rules in settings_of(config):
        expected = _expected(value, rules)
        if expected:
            raise ConfigError(f"{key}={value!r}: expected {expected}")
    layers = config.model.gradient_checkpointing
    if layers not in CHECKPOINTED_LAYERS and not (layers.isdecimal() and int(layers) > 0):
        choices = ", ".join(CHECKPOINTED_LAYERS)
        raise ConfigError(f"model.gradient_checkpointing={layers}: expected {choices}, or n for every n-th layer")
    _check_monitor(config.train.monitor)
    evaluate = config.evaluate
    if evaluate.min_boxes > 0 and evaluate.decoding == "free":
        raise ConfigError(f"evaluate.min_boxes={evaluate.min_boxes}: needs evaluate.decoding=grammar")


def _expected(value: Any, rules: Rules) -> str:
    """Describe what is allowed if `value` is not; "" if it is."""
    if value is None:
        return ""
    if rules.choices and value not in rules.choices:
        return f"one of {', '.join(rules.choices)}"
    if rules.is_path and isinstance(value, str) and value.startswith("$"):
        return "a path; environment variables are not expanded in it"
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
        return ""
    is_low = (rules.least is not None and value < rules.least) or (rules.above is not None and value <= rules.above)
    is_high = (rules.most is not None and value > rules.most) or (rules.below is not None and value >= rules.below)
    if not is_low and not is_high and math.isfinite(value):
        return ""
    bounds = " and ".join(filter(None, bounds_of(rules)))
    return bounds if math.isfinite(value) else f"a finite number, {bounds}".removesuffix(", ")


def bounds_of(rules: Rules) -> tuple[str, str]:
    """Describe the lower and the upper bound of a number; "" where there is none."""
    low = f"at least {rules.least:g}" if rules.least is not None else ""
    low = f"more than {rules.above:g}" if rules.above is not None else low
    high = f"at most {rules.most:.10g}" if rules.most is not None else ""
    return low, f"less than {rules.below:g}" if rules.below is not None else high


def _check_monitor(monitor: Any) -> None:
    good = isinstance(monitor, str) and bool(monitor)
    if isinstance(monitor, dict) and monitor:
        good = all(
            isinstance(weight, (int, float)) and not isinstance(weight, bool) and 0 < weight < float("inf")
            for weight in monitor.values()
        )
    if not good:
        raise ConfigError(
            f"train.monitor={monitor!r}: expected the name of a metric, or names with weights above 0, such as "
            "{mean_iou: 1.0, not_found_acc: 0.5}"
        )


def save_config(config: Config, path: str | Path) -> None:
    """Write every setting as YAML; `~` stays as it was given."""
    OmegaConf.save(OmegaConf.structured(config), path)


def config_sha256(config: Config) -> str:
    """Return a hash of the resolved settings."""
    return hashlib.sha256(OmegaConf.to_yaml(OmegaConf.structured(config)).encode()).hexdigest()
