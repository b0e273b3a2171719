"""One demo or rehearsal per folder: a second one would rewrite the shards that the first one trains on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cogvlm_ft.runtime.run_lock import STOP, Use, run_lock


@contextlib.contextmanager
def own_folder(folder: Path, run: Path, use: Use) -> Iterator[None]:
    """Own the folder until the block ends; create it if necessary. run: the output_dir of its training.

    Raises ConfigError if another process owns it, or if the training of one that was killed still runs.
    """
    with run_lock(folder, use):
        with run_lock(run, use._replace(work="training run", where=str(run), stop=STOP)):
            pass
        yield
