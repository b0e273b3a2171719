"""The samples of each step and each rank: a pure function of (seed, epoch, position).

A sample of the plan is a sequence: an image, or with `data.max_turns_per_image` a part of its turns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cogvlm_ft.config import num_accum_steps
from cogvlm_ft.errors import ConfigError


class Part(NamedTuple):
    """Samples of a batch, one element each.

    passes: number of completed passes over the sample's source before this one: 0 the first time, then 1, ...;
        with one source the same as the epoch.
    weights: 1, or 0 for a sample that only pads the last batch.
    """

    indices: NDArray[np.int64]
    passes: NDArray[np.int64]
    weights: NDArray[np.float32]


@dataclass(frozen=True)
class Item:
    """One sequence of an epoch, as requested from a loader process.

    epoch: number of completed passes over its source, so that augmentation differs every time.
    index: of the image, or of the sequence where images are split into several (`PhotoParts`).
    weight: 1, or 0 for a sequence that only pads the last batch.
    """

    epoch: int
    index: int
    weight: float


WHOLE = -1
"""Used instead of a tile number for the whole image."""


class TurnsPart(NamedTuple):
    """Every num_parts-th turn of an image, starting at turn `number`; each turn is in exactly one part.

    tile: number of the part of the image that is shown, or WHOLE.
    """

    number: int
    num_parts: int
    tile: int = WHOLE

    @property
    def cut(self) -> slice:
        """Slice of the list of turns that this part contains."""
        return slice(self.number, None, self.num_parts)


@dataclass(frozen=True, eq=False)
class PhotoParts:
    """The number of sequences of each image. Sequences are numbered: those of image 0, then those of image 1, ...

    starts: int64[images + 1], the first sequence of every image, then the total number.
    views: int32[sequences, 3], the `TurnsPart` of each if images are shown in tiles too; None: the whole image in all.
    rules: the settings that decide what is asked in tiles.
    """

    starts: NDArray[np.int64]
    views: NDArray[np.int32] | None = None
    rules: str = ""

    def __len__(self) -> int:
        return int(self.starts[-1])

    def find(self, sequence: int) -> tuple[int, TurnsPart]:
        """Return (image, part) of a sequence."""
        photo = int(np.searchsorted(self.starts, sequence, side="right")) - 1
        return photo, self.part(photo, sequence - int(self.starts[photo]))

    def part(self, photo: int, number: int) -> TurnsPart:
        """Return part `number` of this image's turns."""
        if self.views is not None:
            return TurnsPart(*self.views[self.starts[photo] + number].tolist())
        return TurnsPart(number, int(self.starts[photo + 1] - self.starts[photo]))

    def source_sizes(self, num_photos: Sequence[int]) -> tuple[int, ...]:
        """Count the sequences of each source, given its number of images; sources follow one another."""
        return tuple(np.diff(self.starts[np.cumsum([0, *num_photos])]).tolist())

    @property
    def sha256(self) -> str:
        """Identifies this division into sequences."""
        digest = hashlib.sha256(self.starts.astype("<i8").tobytes())
        if self.views is not None:
            digest.update(self.views.astype("<i4").tobytes() + self.rules.encode())
        return digest.hexdigest()


def split_photos(most_turns: NDArray[np.int64], max_turns: int) -> PhotoParts:
    """Divide each image's turns into as few sequences as possible with at most `max_turns` each.

    The number of turns may differ from epoch to epoch, up to `most_turns`, so a part may be empty.
    """
    counts = np.maximum(1, -(-most_turns // max_turns))
    return PhotoParts(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def view_photos(views: Sequence[Sequence[TurnsPart]], rules: str) -> PhotoParts:
    """Number the sequences of images that are shown in tiles too, at least one for each image."""
    assert all(views)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in views])]).astype(np.int64)
    return PhotoParts(starts, np.array([view for row in views for view in row], dtype=np.int32).reshape(-1, 3), rules)


@dataclass(frozen=True)
class SamplePlan:
    """Every sample exactly once per epoch, in an order that depends on the seed and the epoch only.

    The position of a run is one number, `samples_consumed`: the sum of the weights of all global batches so far. It is
    valid for every world size and every global batch size.

    num_samples: per epoch.
    sources: (samples, samples drawn per epoch) of each part of the index, if that is not all of them once. A source is
        walked through repeatedly, each time in another order, and each epoch continues where the last one ended: so
        every sample is drawn before any is drawn again.
    """

    num_samples: int
    global_batch_size: int
    seed: int
    sources: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("global_batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"SamplePlan.{name}: found {getattr(self, name)}; expected at least {least}")
        assert not self.sources or sum(drawn for _, drawn in self.sources) == self.num_samples

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches in an epoch; the last one may be padded."""
        return -(-self.num_samples // self.global_batch_size)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return the samples of the epoch in order, int64[num_samples], read-only."""
        return _epoch_order(self.num_samples, self.seed, epoch, self.sources)[0]

    def steps_done(self, samples_consumed: int) -> float:
        """Return how many steps of this batch size lead to a position; a fraction after steps of another size."""
        epoch, offset = self.position(samples_consumed)
        return epoch * self.steps_per_epoch + offset / self.global_batch_size

    def steps_left(self, samples_consumed: int, epochs: int) -> int:
        """Return how many steps lead from a position to the end of the last of `epochs` epochs."""
        epoch, offset = self.position(samples_consumed)
        left_in_epoch = -(-(self.num_samples - offset) // self.global_batch_size)
        return (epochs - epoch - 1) * self.steps_per_epoch + left_in_epoch if epoch < epochs else 0

    def position(self, samples_consumed: int) -> tuple[int, int]:
        """Return (epoch, offset in the epoch) after `samples_consumed` samples."""
        return divmod(samples_consumed, self.num_samples)

    def global_batch(self, epoch: int, offset: int) -> Part:
        """Return the next `global_batch_size` samples of the epoch.

        At the end of the epoch it is padded with samples from the start of the epoch, of weight 0.
        """
        places = offset + np.arange(self.global_batch_size)
        indices, passes = _epoch_order(self.num_samples, self.seed, epoch, self.sources)
        within = places % self.num_samples
        return Part(indices[within], passes[within], (places < self.num_samples).astype(np.float32))


def plan_samples(sizes: Sequence[int], weights: Sequence[float], *, global_batch_size: int, seed: int) -> SamplePlan:
    """Plan `weight * size` samples of each source per epoch, rounded to whole samples, at least one.

    Weight 1 draws every sample once per epoch, 2 twice, 0.5 a different half each epoch.
    """
    drawn = [max(1, round(Fraction(str(weight)) * size)) for size, weight in zip(sizes, weights, strict=True)]
    sources = tuple(zip(sizes, drawn, strict=True))
    once = all(size == count for size, count in sources)
    return SamplePlan(sum(drawn), global_batch_size, seed, () if once else sources)


def rank_items(batch: Part, *, rank: int, world_size: int, micro_batch_size: int) -> list[list[Item]]:
    """Return a rank's part of a global batch: one list of `micro_batch_size` items per accumulation step.

    Raises ConfigError if the global batch cannot be divided evenly.
    """
    num_steps = num_accum_steps(len(batch.indices), micro_batch_size, world_size)
    starts = [(step * world_size + rank) * micro_batch_size for step in range(num_steps)]
    parts = [[values[start : start + micro_batch_size].tolist() for values in batch] for start in starts]
    return [[Item(p, i, w) for i, p, w in zip(*part, strict=True)] for part in parts]


@lru_cache(maxsize=2)  # one for training, one for evaluation
def _epoch_order(
    num_samples: int, seed: int, epoch: int, sources: tuple[tuple[int, int], ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Compute (samples, passes) of an epoch in order."""
    samples, passes = np.arange(num_samples), np.full(num_samples, epoch)
    if sources:
        walks = [_walk(size, drawn, epoch, (seed, number)) for number, (size, drawn) in enumerate(sources)]
        starts = np.cumsum([0] + [size for size, _ in sources])
        samples = np.concatenate([start + walk[0] for start, walk in zip(starts, walks, strict=False)])
        passes = np.concatenate([walk[1] for walk in walks])
    order = _permutation(num_samples, (seed, epoch))
    found = samples[order], passes[order]
    for each in found:
        each.setflags(write=False)
    return found


def _walk(size: int, drawn: int, epoch: int, seed: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (samples, passes) of the section of one source's endless walk that belongs to the epoch."""
    places = np.arange(epoch * drawn, (epoch + 1) * drawn)
    passes = places // size
    samples = [
        _permutation(size, (*seed, int(number)))[places[passes == number] - number * size]
        for number in np.unique(passes)
    ]
    return np.concatenate(samples), passes


def _permutation(size: int, seed: tuple[int, ...]) -> NDArray[np.int64]:
    # Sort raw bits instead of calling Generator.permutation: NumPy guarantees only the raw stream across versions, and
    # a run must be resumable after an upgrade.
    bits = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(size)
    return np.argsort(bits, kind="stable").astype(np.int64, copy=False)


def most_bad(max_bad_fraction: float, num_samples: int) -> float:
    """Return how many unusable samples are allowed: one also in a set of under 100, none if the fraction is 0."""
    return max(1.0, max_bad_fraction * num_samples) if max_bad_fraction > 0 else 0.0
