"""The folder that an evaluation writes: new, or at least without results, and writable, before hours of work."""

from __future__ import annotations

import tempfile
from pathlib import Path

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.evaluate.evaluate import METRICS_FILE, PREDICTIONS_FILE
from cogvlm_ft.runtime.distributed import computed_by_main


def prepare_output(folder: Path) -> None:
    """Create the folder and try writing there. Collective: rank 0 tries. Raises ConfigError on all ranks."""
    problem = computed_by_main(lambda: _problem_of(folder))
    if problem:
        raise ConfigError(problem)


def _problem_of(folder: Path) -> str:
    """Return why the folder cannot take results; "" if it can."""
    used = [name for name in (METRICS_FILE, PREDICTIONS_FILE) if (folder / name).exists()]
    if used:
        return f"--out {folder}: found {used[0]} of an earlier evaluation; expected a new folder. Choose another name"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        return f"--out {folder}: {error.strerror}; expected a folder that can be written. Choose another place"
    return ""
