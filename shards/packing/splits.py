"""Assign samples to splits and shards: a pure function of the annotations and the settings."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass

from cogvlm_ft.shards.packing.candidates import Candidate

SPLITS = ("train", "val", "test")

_MAX_KEY_BYTES = 80  # a tar header holds names of 100 bytes, with the extension


@dataclass(frozen=True)
class ShardPlan:
    """The candidates of one shard: positions `first` (included) to `last` (excluded)."""

    name: str  # "train-000000"
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    @property
    def split(self) -> str:
        """Return the split that the shard belongs to."""
        return self.name.partition("-")[0]


def plan_shards(num_samples: Mapping[str, int], samples_per_shard: int) -> list[ShardPlan]:
    """Return one plan per shard. The positions of val come first, then those of train and test."""
    plans: dict[str, list[ShardPlan]] = {}
    start = 0
    for split in ("val", "train", "test"):
        end = start + num_samples.get(split, 0)
        firsts = enumerate(range(start, end, samples_per_shard))
        plans[split] = [
            ShardPlan(f"{split}-{number:06d}", first, min(first + samples_per_shard, end)) for number, first in firsts
        ]
        start = end
    return [plan for split in SPLITS for plan in plans[split]]


def key_of(candidate: Candidate) -> str:
    """Return the user's key, or one made from the path of the image."""
    return safe_key(candidate.key or posixpath.splitext(candidate.image)[0])


def safe_key(name: str) -> str:
    """Return the name as a WebDataset key: short, without dots (they end a key) and slashes; distinct if names are."""
    safe = re.sub(r"[^\w-]", "_", name)
    if safe == name and len(safe.encode()) <= _MAX_KEY_BYTES:
        return safe
    return key_with_hash(safe, name)


def key_with_hash(key: str, name: str) -> str:
    """Return the key with a hash of `name`, which makes it unique."""
    return f"{key.encode()[: _MAX_KEY_BYTES - 9].decode(errors='ignore')}-{_sha256(name).hex()[:8]}"


def shuffle_rank(image: str, seed: int) -> bytes:
    """Return the sort key that shuffles the images and keeps all candidates of one image together."""
    return _sha256(f"{seed}:{image}")


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()  # a file name may not be valid UTF-8
