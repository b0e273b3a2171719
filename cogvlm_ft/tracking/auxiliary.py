"""Files that describe a run and are not needed to continue it; a failed write is a warning, once per kind."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from cogvlm_ft.terminal import plain_text

logger = logging.getLogger(__name__)

_reported: set[str] = set()


@contextmanager
def failures_as_warnings(kind: str, errors: type[Exception] = OSError) -> Iterator[None]:
    """Turn an error inside into a warning, the first time for each kind. kind: a plural, such as "sample losses"."""
    try:
        yield
    except errors as error:
        report_failure(kind, error)


def report_failure(kind: str, error: Exception) -> None:
    """Warn that something could not be written, the first time for each kind."""
    if kind not in _reported:
        _reported.add(kind)
        logger.warning(
            "%s cannot be written: %s: %s; expected room and permission in output_dir. Training continues; this is "
            "reported once",
            kind,
            type(error).__name__,
            error,
            exc_info=not isinstance(error, OSError),
        )


def print_line(line: str) -> None:
    """Print a line beside the progress bar; a full disk under the log does not end the run."""
    with failures_as_warnings("printed lines"):
        tqdm.write(plain_text(line))
