"""Record a request to stop (SIGTERM, SIGUSR1), answered by all ranks together between two steps or batches."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from cogvlm_ft.runtime.distributed import any_rank

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequested(Exception):
    """A rank was asked to stop; raised on all of them."""


class StopRequest:
    """Context manager; `seen` becomes true on this rank when a stop signal arrives."""

    def __init__(self) -> None:
        self.seen = False
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def check(self) -> None:
        """Raise StopRequested on every rank if any rank was asked to stop. Collective."""
        if any_rank(self.seen):
            raise StopRequested

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.seen = True
