"""Read a sweep: a YAML list of overrides, with one training run per entry.

- name: lr-1e-5
  settings: [train.lr=1e-5]
- name: lr-5e-5-frozen
  settings: [train.lr=5e-5, "model.freeze=[model.vision.*]"]
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from cogvlm_ft.config import load_config
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.settings import Config
from cogvlm_ft.yaml_text import read_yaml

TASK_VARIABLE = "SLURM_ARRAY_TASK_ID"
NAME = re.compile(r"\w[\w.=-]*")  # of a folder


@dataclass(frozen=True)
class Entry:
    """One training run of a sweep."""

    name: str
    settings: tuple[str, ...]


def read_sweep(path: Path) -> list[Entry]:
    """Read the entries in the order of the file; a ConfigError names the entry."""
    if not path.is_file():
        raise ConfigError(f"--sweep {path}: no such file")
    try:
        rows = read_yaml(path, yaml.BaseLoader)  # text as it is written: 0123, 1e-5
    except (OSError, ValueError) as error:
        raise ConfigError(f"--sweep {path}: not valid YAML: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"--sweep {path}: expected a list of {{name: ..., settings: [key=value, ...]}}")
    entries = [_entry(row, f"--sweep {path}: entry {number}") for number, row in enumerate(rows)]
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"--sweep {path}: {', '.join(twice)} more than once; expected distinct names, since each is a folder"
        )
    return entries


def _entry(row: object, where: str) -> Entry:
    if not isinstance(row, dict) or set(row) != {"name", "settings"} or not isinstance(row["settings"], list):
        raise ConfigError(f"{where} is {row!r}; expected {{name: ..., settings: [key=value, ...]}}")
    name, settings = row["name"], tuple(row["settings"])
    if not isinstance(name, str) or not all(isinstance(setting, str) for setting in settings):
        raise ConfigError(f"{where} is {row!r}; expected a name, and settings written key=value")
    if not NAME.fullmatch(name):
        raise ConfigError(f"{where}: name {name!r} names a folder; expected letters, digits and _ . = -")
    if any("pipe:" in setting for setting in settings):
        raise ConfigError(
            f"{where}: found a command (pipe:); expected it on the command line only, because it is executed. Give "
            "it there"
        )
    if any(setting.startswith("output_dir=") for setting in settings):
        raise ConfigError(
            f"{where} sets output_dir: each run writes into the folder NAME below the output_dir of the sweep"
        )
    return Entry(name, settings)


def load_entry(config: str | None, settings: Sequence[str], entry: Entry) -> Config:
    """Load the settings of one run: the entry overrides the command line, and the run has its own folder."""
    whole = load_config(config, settings)
    own = [f"output_dir={quoted(str(Path(whole.output_dir) / entry.name))}", f"tracking.name={quoted(entry.name)}"]
    return load_config(config, [*settings, *own, *entry.settings])


def quoted(text: str) -> str:
    """Return a YAML value that stays this text, also where it looks like a number."""
    return json.dumps(text, ensure_ascii=False)


def choose_entry(sweep: Path, task: int | None = None) -> Entry:
    """Return entry number `task` of a sweep, by default the number of the Slurm array task."""
    entries = read_sweep(sweep)
    number = os.environ.get(TASK_VARIABLE) if task is None else str(task)
    if number is None or not number.isdecimal() or int(number) >= len(entries):
        raise ConfigError(
            f"--sweep {sweep} has entries 0 to {len(entries) - 1}, and --task or {TASK_VARIABLE} is {number}: "
            f"sbatch --array=0-{len(entries) - 1} runs one task for each"
        )
    return entries[int(number)]


def load_task(config: str | None, settings: Sequence[str], sweep: Path | None, task: int | None = None) -> Config:
    """Load the settings of a training run, or of one entry of a sweep."""
    if sweep is None:
        return load_config(config, settings)
    return load_entry(config, settings, choose_entry(sweep, task))
