"""Warnings about a run that goes on but not well: loss spikes, memory that creeps up, a rank that is always the last.

None of it stops a run. Each needs a while of its own steps before it says anything.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from statistics import median

import psutil
import torch

from cogvlm_ft.runtime.distributed import device, gather_to_main, is_main, rank
from cogvlm_ft.train.meter import Report, Timing

logger = logging.getLogger(__name__)

MIB, GIB = 2**20, 2**30
MAX_NAMED = 16


class LossSpikes:
    """A loss is a spike if it is above the median of the last WINDOW ones by LIMIT robust standard deviations, which
    are 1.4826 x the median absolute deviation, and by LEAST_SHARE of the median.

    Median and deviation do not see single spikes, so one does not hide the next; the second rule is for losses that
    hardly vary, where many deviations are still little. Spikes stay out of the window; where LEAST losses one after
    another are called spikes, that is the new level, and the window begins anew.
    """

    WINDOW, LEAST, LIMIT, LEAST_SHARE = 100, 20, 8.0, 0.3

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=self.WINDOW)
        self._in_a_row = 0

    def usual(self) -> float | None:
        """The median, None as long as there are too few."""
        return median(self._recent) if len(self._recent) >= self.LEAST else None

    def add(self, loss: float) -> bool:
        """Whether it is a spike. Not for NaN."""
        usual = self.usual()
        if usual is not None:
            deviation = 1.4826 * median(abs(each - usual) for each in self._recent)
            if loss > usual + max(self.LIMIT * deviation, self.LEAST_SHARE * usual):
                self._in_a_row += 1
                if self._in_a_row == self.LEAST:
                    self._recent.clear()
                    self._in_a_row = 0
                return True
        self._in_a_row = 0
        self._recent.append(loss)
        return False


class CreepingMemory:
    """Memory creeps if the least of BLOCK steps rises RISES times one after another, each time by LEAST_BYTES.

    The least, because single steps may need more; several rises, because a buffer that is made once is none: so there
    is no warm-up to choose. After a warning it needs as many rises again.
    """

    BLOCK, RISES, LEAST_BYTES = 50, 3, 8 * MIB

    def __init__(self, name: str) -> None:
        self._name = name
        self._block: list[int] = []
        self._levels: list[int] = []

    def add(self, num_bytes: int) -> str | None:
        """What to warn of, after one more step."""
        self._block.append(num_bytes)
        if len(self._block) < self.BLOCK:
            return None
        level, self._block = min(self._block), []
        if self._levels and level - self._levels[-1] < self.LEAST_BYTES:
            self._levels = []
        self._levels.append(level)
        if len(self._levels) <= self.RISES:
            return None
        first, self._levels = self._levels[0], [level]
        per_100_steps = (level - first) / (self.RISES * self.BLOCK) * 100
        return (
            f"{self._name} of rank {rank()} creeps up: {level / GIB:.2f} GiB, {per_100_steps / MIB:.0f} MiB more every "
            f"100 steps for {self.RISES * self.BLOCK} steps"
        )


class SlowRanks:
    """A rank is slow if, in the median of the last WINDOW log lines, it takes LIMIT times what the median rank takes
    by itself. Said once, and again after as many log lines.

    What can be seen: ranks work in lockstep, so all steps take as long on every rank, and a GPU that computes slowly
    makes all wait inside the passes. What differs is the time before a rank's first pass, above all that for its data;
    the time that it then waits for the others is taken off.
    """

    WINDOW, LIMIT = 20, 1.3

    def __init__(self) -> None:
        self._lines: deque[Sequence[Timing]] = deque(maxlen=self.WINDOW)

    def add(self, ranks: Sequence[Timing]) -> str | None:
        """What to warn of, after one more log line."""
        if len(ranks) < 2:
            return None
        self._lines.append(ranks)
        if len(self._lines) < self.WINDOW:
            return None
        own = [median(line[number].own_s for line in self._lines) for number in range(len(ranks))]
        slowest = max(range(len(own)), key=own.__getitem__)
        usual = median(each for number, each in enumerate(own) if number != slowest)
        if own[slowest] < self.LIMIT * usual:
            return None
        wait = median(line[slowest].data_wait_s for line in self._lines)
        others = median(median(timing.data_wait_s for timing in line) for line in self._lines)
        self._lines.clear()
        return (
            f"rank {slowest} is slow: {own[slowest]:.2f} s a step by itself, the others {usual:.2f} s, for "
            f"{self.WINDOW} log lines; it waits {wait:.2f} s for data, the median rank {others:.2f} s. "
            "Its machine's disk, network or processor is slower or busy; more data.num_workers may help"
        )


class Health:
    """All of them, for the loop."""

    def __init__(self) -> None:
        self._spikes, self._num_spikes = LossSpikes(), 0
        self._slow_ranks = SlowRanks()
        self._memory = CreepingMemory("process memory")
        self._gpu_memory = CreepingMemory("GPU memory")
        self._keys: list[Sequence[str]] = []

    def add(self, keys: Sequence[str]) -> None:
        """After every step, with the keys of this rank's rows."""
        self._keys.append(keys)
        found = [self._memory.add(process_bytes())]
        if device().type == "cuda":
            found.append(self._gpu_memory.add(torch.cuda.memory_allocated()))
        for warning in filter(None, found):
            logger.warning("%s", warning)

    def report(self, report: Report, step: int) -> dict[str, float]:
        """Collective. At a log line, `step` being its last step: warnings, and what to log besides."""
        first = step - len(report.losses) + 1
        for number, loss in enumerate(report.losses):
            usual = self._spikes.usual()
            if not math.isnan(loss) and self._spikes.add(loss):
                self._num_spikes += 1
                self._warn_of_spike(first + number, loss, usual, gather_to_main(self._keys[number]))
        self._keys = []
        slow = self._slow_ranks.add(report.ranks)
        if slow and is_main():
            logger.warning("%s", slow)
        return {"loss_spike": float(self._num_spikes)}

    @staticmethod
    def _warn_of_spike(step: int, loss: float, usual: float | None, gathered: list[Sequence[str]] | None) -> None:
        if gathered is not None:
            keys = [key for keys in gathered for key in keys]
            more = f" and {len(keys) - MAX_NAMED} more" if len(keys) > MAX_NAMED else ""
            named = ", ".join(keys[:MAX_NAMED]) + more
            logger.warning("loss spike: %.4g at step %d, %.4g is usual; its samples: %s", loss, step, usual, named)


def process_bytes() -> int:
    """Of this process, without mapped files and what it shares, which come and go with the page cache. Loader processes
    have their own."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared
