"""A config from defaults, a YAML file and `key=value` on the command line, checked by the rules of its fields.

`${oc.env:NAME}` and other resolvers are for the user's own YAML and the command line, such as for an address with a
password. What is written about a run holds the text, not the value, and a run folder's config.yaml may hold none: it
may come from somebody else and would read the environment of whoever opens it.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cogvlm_ft.adapter_settings import check_adapter
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.plain_files import read_bytes, write_text
from cogvlm_ft.run_folder import is_in_run_folder
from cogvlm_ft.settings import CHECKPOINTED_LAYERS, Config, Rules
from cogvlm_ft.terminal import hide
from cogvlm_ft.written_values import explained, value_of_argument, values_of_yaml

PACKAGE = Path(__file__).resolve().parent  # holds configs/ and slurm/, in a checkout by links
RUN_PRESETS, ENGINE_PRESETS = "configs/*.yaml", "configs/deepspeed/*.json"
REFERENCE = re.compile(r"\$\{\.*[A-Za-z_][\w-]*(?:\.[\w-]+|\[[\w-]+\])*\}")  # to another setting
VARIABLE = re.compile(r"oc\.env:\s*(\w+)")
MAX_CONFIG_BYTES = 2**18
MIN_SECRET = 4  # characters: to hide a shorter one would make messages unreadable


@dataclass
class LoadedConfig(Config):
    """Settings, and by key the text as written of those that contain a resolver, which is not a setting."""

    written: dict[str, Any] = field(
        default_factory=dict, repr=False, compare=False, metadata={"omegaconf_ignore": True}
    )


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


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Merge defaults, YAML (a path or the name of a preset) and overrides.

    Raises ConfigError with the source, the key and, for a mistyped one, the nearest.
    """
    file = None if path is None else find_preset(path, RUN_PRESETS, "--config ")
    merged = copy.deepcopy(_defaults())
    if file is not None:
        with _naming(f"--config {path}"):
            merged.merge_with(OmegaConf.create(_read_yaml(file)))
    typed = _merge_arguments(merged, overrides)
    if file is not None and is_in_run_folder(file):
        _refuse_resolvers(merged, typed, file)
    return _config_of(merged, typed)


def load_run_config(file: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Load the settings that a run was started with, to show them: resolvers in its config.yaml stay text.

    Raises ConfigError.
    """
    merged = copy.deepcopy(_defaults())
    with _naming(str(file)):
        merged.merge_with(OmegaConf.create(_read_yaml(file)))
    defaults = _defaults()
    for key, written in _raw_settings(merged):
        if has_resolver(written):
            OmegaConf.update(merged, key, _as_text(written), merge=False)
            if OmegaConf.select(merged, key, throw_on_resolution_failure=False) is None:  # it is to be a number
                OmegaConf.update(merged, key, OmegaConf.select(defaults, key), merge=False)
    return _config_of(merged, _merge_arguments(merged, overrides))


@cache
def _defaults() -> Any:
    """Build the settings with their defaults; a copy takes a fifth of the time."""
    return OmegaConf.structured(Config)


def _merge_arguments(merged: Any, overrides: Sequence[str]) -> Any:
    """Merge `key=value` arguments into `merged`; return what they alone say as nested dicts."""
    typed: Any = OmegaConf.create({})
    for override in overrides:
        if "=" not in override:
            raise ConfigError(
                f"{override!r} on the command line: settings are written key=value, such as train.lr=1e-5"
            )
        with _naming(f"command line {override}"):
            argument = _read_argument(override)
            for settings in (merged, typed):
                _clear_mappings(settings, argument, override.partition("=")[0].strip())
            merged.merge_with(argument)  # in place: a copy of all settings for each argument is slow
        typed.merge_with(argument)
    return OmegaConf.to_container(typed, resolve=False)


def _clear_mappings(settings: Any, argument: Any, key: str) -> None:
    """Clear the settings for which the argument gives a mapping, such as `train.lr_scale={}`: it replaces theirs.

    key: of the argument. A key inside a mapping, such as `train.monitor.mean_iou`, changes that entry alone.
    """
    given = OmegaConf.to_container(argument, resolve=False)
    for name, _, _ in settings_of(Config()):
        if isinstance(value_at(given, name), dict) and not key.startswith(f"{name}."):
            OmegaConf.update(settings, name, {}, merge=False)


def _as_text(written: Any) -> Any:
    """Escape resolvers, so that they stay text."""
    if isinstance(written, dict):
        return {key: _as_text(part) for key, part in written.items()}
    if isinstance(written, list):
        return list(map(_as_text, written))
    return written.replace("${", "\\${") if isinstance(written, str) else written


def _config_of(merged: Any, typed: Any) -> LoadedConfig:
    """Resolve and check the settings."""
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"no value for {', '.join(missing)}: set it in the YAML file or as {missing[0]}=...")
        written = _written_texts(merged)
        resolved: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        first_line = str(error).splitlines()[0]
        for name, value in _variables(OmegaConf.to_yaml(merged)):
            first_line = first_line.replace(value, f"${{oc.env:{name}}}")
        raise ConfigError(f"{error.full_key}: {first_line}{_resolver_hint(first_line)}") from None
    config = LoadedConfig(**vars(resolved), written=written)
    _hide_secrets(config)
    _check(config)
    _refuse_commands(config, typed)
    return config


def _resolver_hint(problem: str) -> str:
    if "Environment variable" in problem:
        return ". Set it (export NAME=...) in the shell that starts the program, on every node"
    if problem.startswith("Interpolation key"):
        return ". Expected another setting, or an environment variable as ${oc.env:NAME}"
    return ". Expected oc.env, as ${oc.env:NAME}" if problem.startswith("Unsupported interpolation") else ""


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        return values_of_yaml(read_bytes(file.expanduser(), MAX_CONFIG_BYTES).decode("utf-8"))
    except UnicodeDecodeError as error:
        found = f"found text that is not UTF-8, byte {error.start}"
        raise ConfigError(f"{found}; expected UTF-8. Save the file as UTF-8") from None


def _read_argument(override: str) -> Any:
    """Return one `key=value` as a config."""
    key, _, text = override.partition("=")
    key = key.strip()
    if not key:
        raise ConfigError("found no key; expected key=value, such as train.lr=1e-5")
    argument = OmegaConf.create({})
    OmegaConf.update(argument, key, value_of_argument(key, text))
    return argument


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Turn errors of reading and merging settings into ConfigErrors that name their source and key."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except (OmegaConfBaseException, OSError, ValueError, TypeError) as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{source}: {f'{key}: ' if key else ''}{explained(str(error).splitlines()[0])}") from error


def has_resolver(written: Any) -> bool:
    """Check for `${oc.env:NAME}` and the like, in a value as it is written; `${train.lr}` is none."""
    if isinstance(written, dict):
        return any(map(has_resolver, (*written.keys(), *written.values())))
    if isinstance(written, list):
        return any(map(has_resolver, written))
    return isinstance(written, str) and "${" in REFERENCE.sub("", written)


def _raw_settings(merged: Any) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value as it is written) of every setting."""
    raw = OmegaConf.to_container(merged, resolve=False, throw_on_missing=False)
    for key, _, _ in settings_of(Config()):
        yield key, value_at(raw, key)


def _written_texts(merged: Any) -> dict[str, Any]:
    """Return, by key, the text as written of settings that contain a resolver. Raises ConfigError."""
    raw = dict(_raw_settings(merged))
    if not any(map(has_resolver, raw.values())):
        return {}
    for key, value in raw.items():
        if key.startswith("tracking.") and "${" in str(value):
            raise ConfigError(
                f"{key}={value}: environment variables are not expanded in settings of W&B; expected plain text. "
                f'Let the shell expand it: {key}="$NAME"'
            )
    return {key: value for key, value in raw.items() if "${" in str(value)}  # a reference may lead to a resolver


def _refuse_resolvers(merged: Any, typed: Any, file: Path) -> None:
    """Raise ConfigError for a resolver in a run folder's config that the command line does not replace."""
    for key, value in _raw_settings(merged):
        if has_resolver(value) and value_at(typed, key) != value:
            raise ConfigError(
                f"{file}: {key}: {value}: environment variables and other resolvers are not expanded in a run folder, "
                f"which may come from others; expected a plain value. Give {key}=... on the command line"
            )


def value_at(settings: Any, key: str) -> Any:
    """Return the value at a dotted key of nested dicts; None if there is none."""
    for name in key.split("."):
        settings = settings.get(name) if isinstance(settings, dict) else None
    return settings


def _hide_secrets(config: LoadedConfig) -> None:
    """Keep environment variables that are part of an address of shards out of everything that is printed."""
    for key in ("data.shards", "data.val_shards"):
        if key not in config.written or "://" not in str(getattr(config.data, key.partition(".")[2])):
            continue
        for name, value in _variables(str(config.written)):
            hide(value, f"${{oc.env:{name}}}")


def _variables(written: str) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of the environment variables that a text names and that are long enough to be hidden."""
    for name in VARIABLE.findall(written):
        value = os.environ.get(name, "")
        if len(value) >= MIN_SECRET:
            yield name, value


def written_settings(config: Config) -> dict[str, Any]:
    """Return every setting as written, for files and W&B; resolvers are not expanded."""
    settings = asdict(config)
    settings.pop("written", None)  # of a LoadedConfig
    for key, value in getattr(config, "written", {}).items():
        *sections, name = key.split(".")
        section: Any = settings
        for each in sections:
            section = section[each]
        section[name] = value
    return settings


def _refuse_commands(config: Config, typed: Any) -> None:
    """Raise ConfigError for shards that are a command (`pipe:`) unless they are typed on the command line."""
    for name in ("shards", "val_shards"):
        value = getattr(config.data, name)
        if _has_command(value) and value_at(typed, f"data.{name}") != value:
            raise ConfigError(
                f"data.{name}: found a command (pipe:) in a config file; expected it on the command line only, because "
                f"it is executed. Give data.{name}=pipe:... on the command line"
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
        elif "rules" in each.metadata:
            yield f"{prefix}{each.name}", value, each.metadata["rules"]


def _check(config: LoadedConfig) -> None:
    for key, value, rules in settings_of(config):
        expected = _expected(value, rules)
        if expected:
            raise ConfigError(f"{key}={config.written.get(key, value)!r}: expected {expected}")
    layers = config.model.gradient_checkpointing
    if layers not in CHECKPOINTED_LAYERS and not (layers.isdecimal() and int(layers) > 0):
        choices = ", ".join(CHECKPOINTED_LAYERS)
        raise ConfigError(f"model.gradient_checkpointing={layers}: expected {choices}, or n for every n-th layer")
    _check_monitor(config.train.monitor)
    check_adapter(config.adapter)
    evaluate = config.evaluate
    if evaluate.min_boxes > 0 and evaluate.decoding == "free":
        raise ConfigError(f"evaluate.min_boxes={evaluate.min_boxes}: needs evaluate.decoding=grammar")


def _expected(value: Any, rules: Rules) -> str:
    """Describe what is allowed if `value` is not; "" if it is."""
    if value is None:
        return ""
    if isinstance(value, list) and rules.length not in (None, len(value)):
        return f"{rules.length} values"
    if isinstance(value, (dict, list)) and (rules.least, rules.above) != (None, None):
        values = list(value.values()) if isinstance(value, dict) else value
        if not all(isinstance(each, (int, float)) for each in values):  # of a name with dots, as train.lr_scale.a.b=1
            return "a number for each pattern, such as {model.vision.*: 0.1}"
        return next(filter(None, (_expected(each, rules) for each in values)), "")
    if rules.choices and value not in rules.choices:
        return f"one of {', '.join(rules.choices)}"
    if rules.is_path and isinstance(value, str) and value.startswith("$") and not has_resolver(value):
        return "a path; environment variables are not expanded in it, except as ${oc.env:NAME}"
    if isinstance(value, str) and "\0" in value:
        return "a text without the character NUL"
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
    """Write every setting as YAML, as it was written: neither `~` nor a resolver is replaced by what it stands for."""
    save_settings(written_settings(config), path)


def save_settings(settings: dict[str, Any], path: str | Path) -> None:
    """Write `written_settings` as YAML."""
    write_text(Path(path), yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def config_sha256(config: Config) -> str:
    """Return a hash of the settings as they are written: a hash of a password would help to guess it."""
    return hashlib.sha256(OmegaConf.to_yaml(OmegaConf.create(written_settings(config))).encode()).hexdigest()
