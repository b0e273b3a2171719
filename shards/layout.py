"""Which sample goes into which shard: a pure function of the annotations and the settings."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from shards.candidates import Candidate, Problem

SPLITS = ("train", "val")

_MAX_KEY_BYTES = 80  # a name in a tar has room for 100, with the extension


@dataclass(frozen=True)
class Slice:
    """The candidates of one shard, with their keys."""

    name: str  # "train-000000"
    candidates: tuple[tuple[str, Candidate], ...]


def assign_keys(candidates: list[Candidate]) -> tuple[dict[str, Candidate], list[tuple[Candidate, Problem]]]:
    """Candidates by unique key, and those whose key another one has already."""
    by_key: dict[str, Candidate] = {}
    duplicates = []
    for candidate in candidates:
        key = safe_key(candidate.key or str(PurePosixPath(candidate.image).with_suffix("")))
        if candidate.key is None and key in by_key and by_key[key].image != candidate.image:
            key = _with_hash(key, candidate.image)  # a.jpg and a.png are two photos
        if key in by_key:
            hint = 'give it another "key", or put all targets of one image on one line'
            detail = f"key {key!r} is taken by {by_key[key].image} ({by_key[key].source}); {hint}"
            duplicates.append((candidate, Problem("sample", "duplicate_key", detail, candidate.source)))
        else:
            by_key[key] = candidate
    return by_key, duplicates


def safe_key(name: str) -> str:
    """The name as a WebDataset key: no dots (they end the key), no slashes, short. Different names stay different."""
    safe = re.sub(r"[^\w-]", "_", name)
    if safe == name and len(safe.encode()) <= _MAX_KEY_BYTES:
        return safe
    return _with_hash(safe, name)


def _with_hash(key: str, name: str) -> str:
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{key.encode()[: _MAX_KEY_BYTES - 9].decode(errors='ignore')}-{digest}"


def plan_slices(by_key: dict[str, Candidate], *, val_fraction: float, seed: int, samples_per_shard: int) -> list[Slice]:
    """Split by image, shuffle and cut. All candidates of one image are on the same side."""
    rank = {candidate.image: _shuffle_rank(candidate.image, seed) for candidate in by_key.values()}
    ordered_images = sorted(rank, key=lambda image: rank[image])
    val_images = set(ordered_images[: round(val_fraction * len(ordered_images))])
    ordered = sorted(by_key.items(), key=lambda item: (rank[item[1].image], item[0]))
    slices = []
    for split in SPLITS:
        part = [item for item in ordered if (item[1].image in val_images) == (split == "val")]
        for number, start in enumerate(range(0, len(part), samples_per_shard)):
            slices.append(Slice(f"{split}-{number:06d}", tuple(part[start : start + samples_per_shard])))
    return slices


def _shuffle_rank(image: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{image}".encode()).hexdigest()
