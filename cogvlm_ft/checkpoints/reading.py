"""Reading checkpoints from disks and servers that fail for a moment.

An error of the file system (EIO, ESTALE, a mount that is gone, an expired ticket) says nothing about the files: it
never makes a checkpoint count as corrupt.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cogvlm_ft.errors import ServerError
from cogvlm_ft.runtime.distributed import from_main, gather_to_main
from cogvlm_ft.runtime.watchdog import progress

logger = logging.getLogger(__name__)

PAUSES_S = (1.0, 4.0, 15.0, 40.0)
"""Pauses between attempts to read a file, in seconds."""

T = TypeVar("T")


def read_again(read: Callable[[], T]) -> T:
    """Return what `read` returns; repeat it after errors of the file system. Raises the last OSError.

    A part that is missing or no file is not such an error, and raised at once.
    """
    for pause_s in PAUSES_S:
        try:
            return read()
        except OSError as error:
            if is_wrong_part(error):
                raise
            logger.warning("%s; reading it again in %g s", error, pause_s)
        progress()
        time.sleep(pause_s)
        progress()
    return read()


def is_wrong_part(error: OSError) -> bool:
    """Return whether the file is wrong (missing, a folder, a pipe, too large) and reading it again cannot help."""
    missing = isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
    return missing or error.errno in (errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG)


def stop_if_unreadable(checkpoint: Path, problem: str) -> None:
    """Raise ServerError on all ranks if one of them has a problem. Collective."""
    gathered = gather_to_main(problem)
    found = from_main("; ".join(filter(None, gathered)) if gathered is not None else None)
    if found:
        raise ServerError(unreadable(checkpoint, found))


def unreadable(path: Path, problem: str) -> str:
    """Describe what a file system did not answer."""
    expected = "expected a file system that can be read. Nothing was changed: start again when it answers"
    return f"{path}: {problem}; {expected}"
