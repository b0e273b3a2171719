"""Warnings about a run that continues but has a problem: loss spikes, growing memory, a slow rank.

None of them stops the run. Each needs a number of steps before its first warning.
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
    """Detects losses far above the recent median.

    A spike exceeds the median of the last WINDOW losses by LIMIT robust standard deviations (1.4826 x the median
    absolute deviation) and by LEAST_SHARE of the median; the second rule is for losses that hardly vary. Single spikes
    change neither median nor deviation. Spikes stay out of the window; after LEAST of them in a row, that is the new
    level, and the window starts over.
    """

    WINDOW, LEAST, LIMIT, LEAST_SHARE = 100, 20, 8.0, 0.3

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=self.WINDOW)
        self._in_a_row = 0

    def usual(self) -> float | None:
        """Return the median, or None while there are too few losses."""
        return median(self._recent) if len(self._recent) >= self.LEAST else None

    def add(self, loss: float) -> bool:
        """Return whether the loss is a spike. Not for NaN."""
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
    """Detects memory that grows step by step.

    It grows if the minimum over BLOCK steps rises RISES times in a row, each time by at least LEAST_BYTES and
    LEAST_FRACTION of it, and the last rise is at least half of the first. The minimum, since single steps may need
    more; several rises, since a buffer that is allocated once is not a leak; not ever smaller ones, since an allocator
    reaches its level that way.
    """

    BLOCK, RISES, LEAST_BYTES, LEAST_FRACTION = 50, 3, 16 * MIB, 0.02

    def __init__(self, name: str) -> None:
        self._name = name
        self._block: list[int] = []
        self._levels: list[int] = []

    def add(self, num_bytes: int) -> str | None:
        """Record one more step; return a warning or None."""
        self._block.append(num_bytes)
        if len(self._block) < self.BLOCK:
            return None
        level, self._block = min(self._block), []
        if self._levels and level - self._levels[-1] < max(self.LEAST_BYTES, self.LEAST_FRACTION * self._levels[-1]):
            self._levels = []
        self._levels.append(level)
        if len(self._levels) <= self.RISES:
            return None
        if 2 * (level - self._levels[-2]) < self._levels[1] - self._levels[0]:
            self._levels.pop(0)
            return None
        first, self._levels = self._levels[0], [level]
        per_100_steps = (level - first) / (self.RISES * self.BLOCK) * 100
        return (
            f"{self._name} of rank {rank()} grows: {level / GIB:.2f} GiB, {per_100_steps / MIB:.0f} MiB more every "
            f"100 steps for {self.RISES * self.BLOCK} steps"
        )


class SlowRanks:
    """Detects a rank that is slow by itself.

    A rank is slow if, in the median of the last WINDOW log lines, its own time is LIMIT times that of the median rank.
    Ranks run in lockstep, so a GPU that computes slowly makes all ranks wait inside the passes and cannot be told
    apart. What differs is the time before a rank's first pass, mainly for its data; waiting for the others does not
    count.
    """

    WINDOW, LIMIT = 20, 1.3

    def __init__(self) -> None:
        self._lines: deque[Sequence[Timing]] = deque(maxlen=self.WINDOW)

    def add(self, ranks: Sequence[Timing]) -> str | None:
        """Record one more log line; return a warning or None."""
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
    """Runs all checks on the steps of a run."""

    def __init__(self) -> None:
        self._spikes, self._num_spikes = LossSpikes(), 0
        self._slow_ranks = SlowRanks()
        self._memory = CreepingMemory("process memory")
        self._gpu_memory = CreepingMemory("GPU memory")
        self._keys: list[Sequence[str]] = []

    def add(self, keys: Sequence[str]) -> None:
        """Record a step by the keys of this rank's rows, and warn of growing memory."""
        self._keys.append(keys)
        found = [self._memory.add(process_bytes())]
        if device().type == "cuda":
            found.append(self._gpu_memory.add(torch.cuda.memory_allocated()))
        for warning in filter(None, found):
            logger.warning("%s", warning)

    def report(self, report: Report, step: int) -> dict[str, float]:
        """Warn of loss spikes and slow ranks at a log line that ends with `step`; return values to log. Collective."""
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
    """Return the bytes of this process alone: no mapped files, shared pages or loader processes."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared
