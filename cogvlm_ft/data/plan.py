"""Which samples each step and each rank sees: a pure function of (seed, epoch, position)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cogvlm_ft.errors import ConfigError

Part = tuple[NDArray[np.int64], NDArray[np.float32]]
"""(sample indices, weights): weight 1 for a sample of its own, 0 for one that only fills the last batch."""


@dataclass(frozen=True)
class SamplePlan:
    """Every sample exactly once an epoch, in an order that depends on the seed and the epoch only.

    The position of a run is one number, `samples_consumed`: the sum of the weights of all global batches so far. It is
    true for every world size, and for every global batch size.
    """

    num_samples: int
    global_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("global_batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"SamplePlan: {name}={getattr(self, name)}, wanted {least} or more")

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in a whole epoch; the last one may be padded."""
        return -(-self.num_samples // self.global_batch_size)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The epoch's permutation of all samples, int64[num_samples], read-only."""
        return _epoch_order(self.num_samples, self.seed, epoch)

    def position(self, samples_consumed: int) -> tuple[int, int]:
        """(epoch, offset in the epoch) after that many samples."""
        return divmod(samples_consumed, self.num_samples)

    def global_batch(self, epoch: int, offset: int) -> Part:
        """(int64[G], float32[G]): the next samples of the epoch, filled up from its start with weight 0 at the end."""
        places = offset + np.arange(self.global_batch_size)
        indices = self.order(epoch)[places % self.num_samples]
        return indices, (places < self.num_samples).astype(np.float32)


def rank_part(
    indices: NDArray[np.int64],
    weights: NDArray[np.float32],
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int,
) -> list[Part]:
    """A rank's part of a global batch, one entry of `micro_batch_size` samples per accumulation step.

    Raises ConfigError if the global batch cannot be dealt out evenly.
    """
    per_step = world_size * micro_batch_size
    if len(indices) % per_step:
        below = len(indices) // per_step * per_step
        nearest = " or ".join(str(size) for size in (below, below + per_step) if size)
        raise ConfigError(
            f"global_batch_size={len(indices)} is no multiple of world_size * micro_batch_size = "
            f"{world_size} * {micro_batch_size} = {per_step}; set it to {nearest}"
        )
    starts = range(rank * micro_batch_size, len(indices), per_step)
    return [(indices[s : s + micro_batch_size], weights[s : s + micro_batch_size]) for s in starts]


@lru_cache(maxsize=2)  # one for training, one for evaluation
def _epoch_order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    # Sorting raw bits instead of Generator.permutation: NumPy promises the same raw stream in every version, and only
    # then can a run be resumed after an upgrade.
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_samples)
    order = np.argsort(bits, kind="stable").astype(np.int64, copy=False)
    order.setflags(write=False)
    return order
