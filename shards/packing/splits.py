"""Which sample goes into which shard: a pure function of the annotations and the settings."""

from __future__ import annotations

import hashlib
import posixpath
import re
from dataclasses import dataclass

from cogvlm_ft.shards.packing.candidates import Candidate

SPLITS = ("train", "val")

_MAX_KEY_BYTES = 80  # a name in a tar has room for 100, with the extension


@dataclass(frozen=True)
class Slice:
    """The candidates of one shard: those at the places `first` (included) to `last` (not included)."""

    name: str  # "train-000000"
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first


def cut_into_slices(num_val: int, num_samples: int, samples_per_shard: int) -> list[Slice]:
    """One per shard. The places 0 to `num_val` are val, the others train."""
    slices = []
    for split, start, end in (("train", num_val, num_samples), ("val", 0, num_val)):
        for number, first in enumerate(range(start, end, samples_per_shard)):
            slices.append(Slice(f"{split}-{number:06d}", first, min(first + samples_per_shard, end)))
    return slices


def key_of(candidate: Candidate) -> str:
    """The user's key, or one made from the path of the image."""
    return safe_key(candidate.key or posixpath.splitext(candidate.image)[0])


def safe_key(name: str) -> str:
    """The name as a WebDataset key: no dots (they end the key), no slashes, short. Different names stay different."""
    safe = re.sub(r"[^\w-]", "_", name)
    if safe == name and len(safe.encode()) <= _MAX_KEY_BYTES:
        return safe
    return key_with_hash(safe, name)


def key_with_hash(key: str, name: str) -> str:
    """The key, made different from that of any other name."""
    return f"{key.encode()[: _MAX_KEY_BYTES - 9].decode(errors='ignore')}-{_sha256(name).hex()[:8]}"


def shuffle_rank(image: str, seed: int) -> bytes:
    """Sorting by it shuffles the images; all candidates of one image stay together."""
    return _sha256(f"{seed}:{image}")


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()  # a file name may be no UTF-8
