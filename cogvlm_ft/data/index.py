"""Where every sample of a shard set lies on disk, so that any of them can be read directly."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cogvlm_ft.data.tars import Entry, Loss, scan_tar
from cogvlm_ft.errors import DataError

INDEX_VERSION = 1

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """One split of a shard set. The arrays have one element per sample, in the order of the shards.

    keys, exts: bytes; `key(i)` gives text.
    shard_number: which of `shard_paths`.
    image_offset, image_size, json_offset, json_size: of the data bytes in that tar.
    losses: what a scan of the tars could not use; empty if the offsets files were used.
    data_sha256: identifies the data of the split.
    """

    folder: Path
    split: str
    shard_paths: tuple[Path, ...]
    keys: NDArray[np.bytes_]
    exts: NDArray[np.bytes_]
    shard_number: NDArray[np.int32]
    image_offset: NDArray[np.int64]
    image_size: NDArray[np.int64]
    json_offset: NDArray[np.int64]
    json_size: NDArray[np.int64]
    losses: tuple[Loss, ...]
    data_sha256: str

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, i: int) -> str:
        """Name of sample i."""
        return bytes(self.keys[i]).decode("utf-8", "backslashreplace")


class _Shard(NamedTuple):
    entries: list[Entry]
    losses: list[Loss]
    identity: str


def load_index(folder: str | Path, split: str) -> ShardIndex:
    """Describe the tars of a split: from index.json and the offsets files if they are there, else by scanning.

    Raises DataError if there is nothing to read, or if the tars cannot be read in place.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; wanted one with WebDataset shards, as shards/build.py writes them")
    paths = _paths_by_index(folder, split)
    if paths is None:
        paths = _paths_by_name(folder, split)
    shards = [_load_shard(path) for path in paths]
    index = _join(folder, split, paths, shards)
    if index.losses:
        counts = dict(Counter(loss.reason for loss in index.losses))
        _log.warning("%s, split %s: not usable: %s; first: %s", folder, split, counts, index.losses[0])
    if not len(index):
        hint = f"lost while scanning: {index.losses[:3]}" if index.losses else "build with another --val-fraction"
        raise DataError(f"{folder}: split {split!r} has no samples in its {len(paths)} shards; {hint}")
    return index


def read_json_file(path: Path) -> Any:
    """The JSON in a file; DataError if it holds none."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no valid JSON: {error}; build the shards again with --overwrite") from None


def _paths_by_index(folder: Path, split: str) -> list[Path] | None:
    """The shards that index.json names, or None if these shards come from elsewhere and have none of ours."""
    path = folder / "index.json"
    if not path.is_file():
        if (folder / "build.json").is_file():
            raise DataError(f"{folder} is an unfinished build (no index.json); run shards/build.py again to finish it")
        return None
    content = read_json_file(path)
    if not isinstance(content, dict) or "splits" not in content:
        _log.info("%s was not written by shards/build.py; scanning the tars instead", path)
        return None
    if content.get("version") != INDEX_VERSION:
        raise DataError(f"{path}: version {content.get('version')!r}, wanted {INDEX_VERSION}; build the shards again")
    if split not in content["splits"]:
        raise DataError(f"{path}: no split {split!r}, found {sorted(content['splits'])}")
    paths = [folder / Path(shard["path"]).name for shard in content["splits"][split]["shards"]]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{folder}: index.json names {len(missing)} shards that are not there, such as {missing[0]}")
    return paths


def _paths_by_name(folder: Path, split: str) -> list[Path]:
    paths = sorted(folder.glob(f"{split}-*.tar"))
    if paths:
        return paths
    names = sorted(path.name for path in folder.iterdir())
    if any(re.fullmatch(rf"{re.escape(split)}-.*\.(tgz|tar\..+)", name) for name in names):
        raise DataError(f"{folder} holds compressed tars; samples are read in place: unpack them to plain .tar first")
    found = ", ".join(names[:10]) or "nothing"
    raise DataError(f"{folder}: no shards called {split}-*.tar; found {found}{' ...' if len(names) > 10 else ''}")


def _load_shard(path: Path) -> _Shard:
    size = path.stat().st_size
    offsets_path = path.with_suffix(".json")
    if offsets_path.is_file():
        try:
            return _shard_of_offsets(json.loads(offsets_path.read_bytes()), size)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            _log.warning("%s does not fit %s (%s); scanning the tar instead", offsets_path.name, path, error)
    entries, losses = scan_tar(path)
    layout = hashlib.sha256(repr(entries).encode("utf-8", "backslashreplace")).hexdigest()
    return _Shard(entries, losses, f"{size}:{layout}")


def _shard_of_offsets(content: Any, size: int) -> _Shard:
    """Raises ValueError, KeyError or TypeError if this does not describe a tar of that size."""
    if content["size"] != size:
        raise ValueError(f"made for {content['size']} bytes, the tar has {size}")
    entries = [Entry(row["key"], row["ext"], *row["image"], *row["json"]) for row in content["samples"]]
    for entry in entries:
        if min(entry[2:]) < 0 or max(entry.image_offset + entry.image_size, entry.json_offset + entry.json_size) > size:
            raise ValueError(f"sample {entry.key!r} lies outside the tar")
    return _Shard(entries, [], str(content["sha256"]))


def _join(folder: Path, split: str, paths: list[Path], shards: list[_Shard]) -> ShardIndex:
    entries = [entry for shard in shards for entry in shard.entries]
    places = np.array([entry[2:] for entry in entries], dtype=np.int64).reshape(-1, 4)
    identity = "\n".join(f"{path.name} {shard.identity}" for path, shard in zip(paths, shards, strict=True))
    return ShardIndex(
        folder=folder,
        split=split,
        shard_paths=tuple(paths),
        keys=np.array([entry.key.encode("utf-8", "backslashreplace") for entry in entries], dtype=np.bytes_),
        exts=np.array([entry.ext.encode() for entry in entries], dtype=np.bytes_),
        shard_number=np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard.entries) for shard in shards]),
        image_offset=places[:, 0].copy(),
        image_size=places[:, 1].copy(),
        json_offset=places[:, 2].copy(),
        json_size=places[:, 3].copy(),
        losses=tuple(loss for shard in shards for loss in shard.losses),
        data_sha256=hashlib.sha256(identity.encode()).hexdigest(),
    )
