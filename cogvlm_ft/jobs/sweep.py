"""A sweep: one YAML of overrides, one training for each entry.

- name: lr-1e-5
  settings: [train.lr=1e-5]
- name: lr-5e-5-frozen
  settings: [train.lr=5e-5, "model.freeze=[model.vision.*]"]
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cogvlm_ft.config import load_config
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.settings import Config

TASK_VARIABLE = "SLURM_ARRAY_TASK_ID"
NAME = re.compile(r"\w[\w.=-]*")  # of a folder


@dataclass(frozen=True)
class Entry:
    """One training of a sweep."""

    name: str
    settings: tuple[str, ...]


def read_sweep(path: Path) -> list[Entry]:
    """Entries in the order of the file; ConfigError says what is wrong with which."""
    if not path.is_file():
        raise ConfigError(f"--sweep {path}: no such file")
    try:
        rows = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")))
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--sweep {path} is no valid YAML: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"--sweep {path}: wanted a list of {{name: ..., settings: [key=value, ...]}}")
    entries = [_entry(row, f"--sweep {path}: entry {number}") for number, row in enumerate(rows)]
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"--sweep {path}: {', '.join(twice)} more than once; each name is a folder of its own")
    return entries


def _entry(row: object, where: str) -> Entry:
    if not isinstance(row, dict) or set(row) != {"name", "settings"} or not isinstance(row["settings"], list):
        raise ConfigError(f"{where} is {row!r}: wanted {{name: ..., settings: [key=value, ...]}}")
    name, settings = str(row["name"]), tuple(str(setting) for setting in row["settings"])
    if not NAME.fullmatch(name):
        raise ConfigError(f"{where}: name {name!r} names a folder: wanted letters, digits and _ . = -")
    if any(setting.startswith("output_dir=") for setting in settings):
        raise ConfigError(f"{where} sets output_dir: each training writes into a folder NAME of the sweep's")
    return Entry(name, settings)


def load_entry(config: str | None, settings: Sequence[str], entry: Entry) -> Config:
    """The settings of one training: the entry's override those of the command line, in a folder of its own."""
    whole = load_config(config, settings)
    own = [f"output_dir={Path(whole.output_dir) / entry.name}", f"tracking.name={entry.name}"]
    return load_config(config, [*settings, *own, *entry.settings])


def choose_entry(sweep: Path, task: int | None = None) -> Entry:
    """Number `task` of a sweep, else the one that Slurm says."""
    entries = read_sweep(sweep)
    number = os.environ.get(TASK_VARIABLE) if task is None else str(task)
    if number is None or not number.isdecimal() or int(number) >= len(entries):
        raise ConfigError(
            f"--sweep {sweep} has entries 0 to {len(entries) - 1}, and --task or {TASK_VARIABLE} is {number}: "
            f"sbatch --array=0-{len(entries) - 1} makes one task for each"
        )
    return entries[int(number)]


def load_task(config: str | None, settings: Sequence[str], sweep: Path | None, task: int | None = None) -> Config:
    """Settings of a training, or of one entry of a sweep."""
    if sweep is None:
        return load_config(config, settings)
    return load_entry(config, settings, choose_entry(sweep, task))
