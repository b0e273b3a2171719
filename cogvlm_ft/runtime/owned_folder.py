"""The lock of a run folder for all ranks: rank 0 owns it, and every rank sees the same folder."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.runtime.distributed import from_main, is_main, shared_errors
from cogvlm_ft.runtime.run_lock import POLL_S, Owner, read_owner, run_lock
from cogvlm_ft.runtime.watchdog import progress

SHOWN_AFTER_S = 60.0
"""How long a file of another node may stay unseen: NFS keeps the names of a folder for up to a minute."""


@contextlib.contextmanager
def owned_run_folder(folder: Path) -> Iterator[None]:
    """Own the folder on rank 0 until the block ends. Collective.

    Raises ConfigError on all ranks if another training owns it, or if it is another folder on another node.
    """
    with contextlib.ExitStack() as stack:
        problem: str | None = None
        lock: tuple[str, Owner] | None = None
        if is_main():
            try:
                lock = stack.enter_context(run_lock(folder))
            except (ConfigError, OSError) as error:
                problem = str(error)
        problem_of_main, lock_of_main = from_main((problem, lock))
        if problem_of_main:
            raise ConfigError(problem_of_main)
        with shared_errors():
            _check_shared(folder, *lock_of_main)
        yield


def _check_shared(folder: Path, name: str, owner: Owner) -> None:
    """Raise ConfigError if rank 0's lock is not seen here: each rank would write its part of a checkpoint elsewhere."""
    end_s = time.monotonic() + SHOWN_AFTER_S
    while read_owner(folder / name) != owner:
        if time.monotonic() > end_s:
            raise ConfigError(
                f"output_dir={folder}: found another folder on {socket.gethostname()} than on {owner.host}, where rank "
                "0 is; expected the same on all nodes. Choose one on a file system that all nodes share"
            )
        progress()
        time.sleep(POLL_S)
        with contextlib.suppress(OSError):
            list(folder.iterdir())  # makes NFS ask its server
