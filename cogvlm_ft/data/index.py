"""Location of every sample of a shard set, on disk or on a server, for direct access to any of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cogvlm_ft.data.addresses import name_of, shown
from cogvlm_ft.data.findings import explain_losses, repeated_keys, report_findings, text_of
from cogvlm_ft.data.remote import RemoteShard
from cogvlm_ft.data.shard import Shard
from cogvlm_ft.data.shard_sets import SplitChoice, load_source
from cogvlm_ft.data.sources import SEPARATOR, check_once, shard_sources
from cogvlm_ft.data.tars import Loss
from cogvlm_ft.data.whole_files import Cache
from cogvlm_ft.errors import DataError


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """One split of one or several shard sets. The arrays have one element per sample, in the order of the shards.

    keys, exts: bytes; `key(i)` gives text. With several sources a key starts with the name of its source, and one that
        several tars of a source have with the name of its tar.
    shard_number: index into `shard_paths`.
    image_offset, image_num_bytes, json_offset, json_num_bytes: of the data bytes in that tar.
    num_targets, num_turns: of the record; -1 if only the record itself holds them, as in shards of other tools.
    source_sizes, source_weights: number of samples of each source, one source after another, and how often they are
        drawn per epoch.
    losses: what a scan of the tars could not use; empty if the offsets files were used.
    data_sha256: identifies the data of the split and the weights.
    notes: what a scan decided although nothing is lost.
    """

    split: str
    shard_paths: tuple[Path | RemoteShard, ...]
    keys: NDArray[np.bytes_]
    exts: NDArray[np.bytes_]
    shard_number: NDArray[np.int32]
    image_offset: NDArray[np.int64]
    image_num_bytes: NDArray[np.int64]
    json_offset: NDArray[np.int64]
    json_num_bytes: NDArray[np.int64]
    num_targets: NDArray[np.int32]
    num_turns: NDArray[np.int32]
    source_sizes: tuple[int, ...]
    source_weights: tuple[float, ...]
    losses: tuple[Loss, ...]
    data_sha256: str
    notes: tuple[Loss, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, i: int) -> str:
        """Return the name of sample i."""
        return bytes(self.keys[i]).decode("utf-8", "backslashreplace")


def load_index(
    shards: object,
    split: str,
    *,
    cache_dir: str | Path | None = None,
    cache_gib: float = 100.0,
    choice: SplitChoice | None = None,
) -> ShardIndex:
    """Describe the tars of a split: from index.json and the offsets files if they exist, else by scanning.

    shards: the value of data.shards: folders or tars, on disk or at an address, or a list of these with weights.
    cache_dir, cache_gib: where whole shards are kept that cannot be read in place, and how much of them.
    Raises DataError if there is nothing to read.
    """
    choice = choice or SplitChoice()
    sources = shard_sources(shards, choice.setting)
    cache = Cache(Path(cache_dir).expanduser(), int(cache_gib * 2**30)) if cache_dir else None
    found = [load_source(source.path, split, cache, choice) for source in sources]
    check_once(choice.setting, [_address_of(shard) for source in found for shard in source])
    found = [explain_losses(shards) for shards in found]
    index = _join(split, [source.path for source in sources], [source.weight for source in sources], found)
    report_findings(split, found)
    if not len(index):
        lost = "; ".join(text_of(loss) for loss in index.losses[:3])
        hint = f"Lost while scanning: {lost}" if lost else "Build with another --val-fraction"
        where = ", ".join(shown(source.path) for source in sources)
        raise DataError(f"{where}: split {split!r}: found no samples; expected at least one. {hint}")
    return index


def _address_of(shard: Shard) -> str:
    return shard.path.url if isinstance(shard.path, RemoteShard) else str(shard.path)


def _join(split: str, names: list[str], weights: list[float], sources: list[list[Shard]]) -> ShardIndex:
    shards = [shard for source in sources for shard in source]
    sizes = [sum(len(shard.keys) for shard in source) for source in sources]
    keys = [
        _prefixed(keys, prefix)
        for source, prefix in zip(sources, _prefixes(names), strict=True)
        for keys in _unique_keys(source)
    ]
    places = np.concatenate([shard.places for shard in shards]) if shards else np.zeros((0, 4), np.int64)
    questions = np.concatenate([np.zeros((0, 2), np.int32), *(shard.questions for shard in shards)])
    filled = [number for number, size in enumerate(sizes) if size]
    return ShardIndex(
        split=split,
        shard_paths=tuple(shard.path for shard in shards),
        keys=np.concatenate([np.zeros(0, np.bytes_), *keys]),
        exts=np.concatenate([np.zeros(0, np.bytes_), *(shard.exts for shard in shards)]),
        shard_number=np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard.keys) for shard in shards]),
        image_offset=places[:, 0].copy(),
        image_num_bytes=places[:, 1].copy(),
        json_offset=places[:, 2].copy(),
        json_num_bytes=places[:, 3].copy(),
        num_targets=questions[:, 0].copy(),
        num_turns=questions[:, 1].copy(),
        source_sizes=tuple(sizes[number] for number in filled),
        source_weights=tuple(weights[number] for number in filled),
        losses=tuple(loss for shard in shards for loss in shard.losses),
        data_sha256=_identity(weights, sources),
        notes=tuple(note for shard in shards for note in shard.notes),
    )


def _prefixes(names: list[str]) -> list[str]:
    """Return the prefixes of the keys of each source; empty if there is one source."""
    if len(names) == 1:
        return [""]
    last = [name_of(first) or Path(shown(first)).name for first in (name.split(SEPARATOR)[0] for name in names)]
    return [f"{name}/" if last.count(name) == 1 else f"{name}-{number}/" for number, name in enumerate(last)]


def _unique_keys(shards: list[Shard]) -> list[NDArray[np.bytes_]]:
    """Return the keys of the tars of a source; those that several tars have begin with the name of their tar."""
    repeated = repeated_keys(shards)
    if not len(repeated):
        return [shard.keys for shard in shards]
    stems = [shard.path.name.partition(".")[0] for shard in shards]
    names = [f"{stem}/" if stems.count(stem) == 1 else f"{stem}-{number}/" for number, stem in enumerate(stems)]
    return [
        np.where(np.isin(shard.keys, repeated), _prefixed(shard.keys, name), shard.keys)
        for shard, name in zip(shards, names, strict=True)
    ]


def _prefixed(keys: NDArray[np.bytes_], prefix: str) -> NDArray[np.bytes_]:
    return np.char.add(prefix.encode("utf-8", "backslashreplace"), keys) if prefix else keys


def _identity(weights: list[float], sources: list[list[Shard]]) -> str:
    digests = []
    for shards in sources:
        lines = "\n".join(f"{shard.path.name} {shard.identity}" for shard in shards)
        digests.append(hashlib.sha256(lines.encode("utf-8", "backslashreplace")).hexdigest())
    if weights == [1.0]:
        return digests[0]
    lines = "\n".join(f"{weight} {digest}" for weight, digest in zip(weights, digests, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()
