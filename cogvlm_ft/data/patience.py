"""How long requests to a shard server are retried: `data.retry_s`, in loader processes a few seconds.

A loader process gives up soon, so that its rank answers stop signals: the rank waits (`train/step_reader.py`).
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from cogvlm_ft.data.addresses import shown
from cogvlm_ft.errors import DataError, ServerError
from cogvlm_ft.runtime.stop_signals import ignore_stop_signals, is_stop_requested
from cogvlm_ft.runtime.watchdog import progress

LOADER_RETRY_S = 10.0
"""How long a loader process retries, in seconds."""

_DELAYS_S = (0.5, 2.0, 8.0)
_LONGEST_DELAY_S = 30.0
_TICK_S = 0.5
_BETWEEN_LINES_S = 10.0
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # of the cache: waiting does not help

_log = logging.getLogger(__name__)

T = TypeVar("T")


class _Process:
    """State of this process. Several threads may wait for one server: only one of them reports it."""

    retry_s = 600.0
    reported_at = float("-inf")
    lock = threading.Lock()


def set_retry_s(retry_s: float) -> None:
    """Set how long this process retries requests, by `data.retry_s`."""
    _Process.retry_s = retry_s


def start_loader_process(worker: int) -> None:
    """Prepare a process that a rank has started to read samples."""
    ignore_stop_signals(worker)
    set_retry_s(min(_Process.retry_s, LOADER_RETRY_S))


@dataclass
class Patience:
    """Waits between the attempts of one request. retry_s: from the first failure on."""

    retry_s: float
    num_attempts: int = 0
    failed_at: float = field(default=0.0)

    def wait(self, what: str) -> bool:
        """Wait before the next attempt and report the failure; return False if there is no further attempt."""
        self.num_attempts += 1
        if self.num_attempts == 1:
            self.failed_at = time.monotonic()
        left_s = self.retry_s - (time.monotonic() - self.failed_at)
        if left_s <= 0 or is_stop_requested():
            return False
        self._report(what, left_s)
        delays = (*_DELAYS_S, _LONGEST_DELAY_S)
        delay_s = delays[min(self.num_attempts, len(delays)) - 1]
        until = time.monotonic() + min(delay_s, left_s)
        while (rest_s := until - time.monotonic()) > 0:
            progress()
            if is_stop_requested():
                return False
            time.sleep(min(_TICK_S, rest_s))
        return True

    def _report(self, what: str, left_s: float) -> None:
        """Log the failure, but not that of a moment, and not every attempt."""
        now = time.monotonic()
        with _Process.lock:
            if self.num_attempts < len(_DELAYS_S) or now - _Process.reported_at < _BETWEEN_LINES_S:
                return
            _Process.reported_at = now
        _log.warning("%s; trying again for %.0f s more (data.retry_s)", what, left_s)


def retried(url: str, action: Callable[[], T]) -> T:
    """Repeat an action that raises OSError, as long as this process may. Raises ServerError."""
    patience = Patience(_Process.retry_s)
    while True:
        try:
            return action()
        except OSError as error:  # also every error of requests
            what = f"{shown(url)}: {shown(str(error))}"
            if error.errno in _LOCAL:
                raise DataError(f"{what}; expected room and permission in data.cache_dir. Check the folder") from None
            if not patience.wait(what):
                waited_s = time.monotonic() - patience.failed_at
                times = f"{patience.num_attempts} attempts" if patience.num_attempts > 1 else "1 attempt"
                raise ServerError(
                    f"{what}; gave up after {times} in {waited_s:.0f} s. Start again when the server answers"
                ) from None
