"""Location of every sample of a shard set, on disk or on a server, for direct access to any of them."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cogvlm_ft.data.remote import Cache, RemoteShard, check_url, fetch_json, gives_ranges, is_url, shown
from cogvlm_ft.data.tars import IMAGE_EXTENSIONS, MAX_MEMBER_BYTES, Entry, Loss, scan_tar
from cogvlm_ft.errors import ConfigError, DataError

INDEX_VERSION = 1

_UNKNOWN = (-1, -1)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """One split of one or several shard sets. The arrays have one element per sample, in the order of the shards.

    keys, exts: bytes; `key(i)` gives text. With several sources a key starts with the name of its source.
    shard_number: index into `shard_paths`.
    image_offset, image_num_bytes, json_offset, json_num_bytes: of the data bytes in that tar.
    num_targets, num_turns: of the record; -1 if only the record itself holds them, as in shards of other tools.
    source_sizes, source_weights: number of samples of each source, one source after another, and how often they are
        drawn per epoch.
    losses: what a scan of the tars could not use; empty if the offsets files were used.
    data_sha256: identifies the data of the split and the weights.
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

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, i: int) -> str:
        """Return the name of sample i."""
        return bytes(self.keys[i]).decode("utf-8", "backslashreplace")


class _Shard(NamedTuple):
    """Samples of one tar.

    places: int64[samples, 4], the numbers of an Entry. questions: int32[samples, 2], num_targets and num_turns.
    """

    path: Path | RemoteShard
    keys: NDArray[np.bytes_]
    exts: NDArray[np.bytes_]
    places: NDArray[np.int64]
    questions: NDArray[np.int32]
    losses: list[Loss]
    identity: str


class _Row(NamedTuple):
    """Entry of one shard in index.json."""

    name: str
    size: int
    sha256: str
    num_samples: int


@dataclass(frozen=True)
class ShardSource:
    """One of the shard sets of a run. weight: how often each of its samples is drawn per epoch."""

    path: str
    weight: float = 1.0


def shard_sources(shards: object) -> list[ShardSource]:
    """Parse data.shards. Raises ConfigError if it is not a folder or a list of folders."""
    entries = shards if isinstance(shards, list) else [shards]
    sources = []
    for entry in entries:
        fields = entry if isinstance(entry, dict) else {"path": entry}
        path, weight = fields.get("path"), fields.get("weight", 1.0)
        good = isinstance(path, (str, Path)) and str(path) and set(fields) <= {"path", "weight"}
        if not good or isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= 1e6:
            expected = "a folder, or a list of folders or {path: folder, weight: a number above 0}"
            raise ConfigError(f"data.shards: found {shown(repr(entry)):.200}; expected {expected}")
        sources.append(ShardSource(str(path), float(weight)))
    if not sources:
        raise ConfigError("data.shards: found an empty list; expected at least one folder")
    return sources


def load_index(
    shards: object, split: str, *, cache_dir: str | Path | None = None, cache_gib: float = 100.0
) -> ShardIndex:
    """Describe the tars of a split: from index.json and the offsets files if they exist, else by scanning.

    shards: the value of data.shards: a folder, the URL of one, or a list of these with weights.
    cache_dir, cache_gib: where whole shards are kept if their server does not support ranges, and how much of them.
    Raises DataError if there is nothing to read, or if the tars cannot be read in place.
    """
    sources = shard_sources(shards)
    cache = Cache(Path(cache_dir).expanduser(), int(cache_gib * 2**30)) if cache_dir else None
    found = [_load_source(source.path, split, cache) for source in sources]
    index = _join(split, [source.path for source in sources], [source.weight for source in sources], found)
    if index.losses:
        counts = dict(Counter(loss.reason for loss in index.losses))
        _log.warning("split %s: unusable samples by reason: %s; first: %s", split, counts, index.losses[0])
    if not len(index):
        hint = f"Lost while scanning: {index.losses[:3]}" if index.losses else "Build with another --val-fraction"
        where = ", ".join(shown(source.path) for source in sources)
        raise DataError(f"{where}: split {split!r}: found no samples; expected at least one. {hint}")
    return index


def read_json_file(path: Path) -> Any:
    """Return the JSON in a file. Raises DataError if it is not valid."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}; expected valid JSON. Build the shards again with --overwrite") from None


def _load_source(path: str, split: str, cache: Cache | None) -> list[_Shard]:
    if is_url(path):
        return _load_remote(path.rstrip("/") + "/", split, cache)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise DataError(
            f"{folder}: found {found}; expected a folder of WebDataset shards. Write them with shards/build.py"
        )
    rows = _rows_by_index(folder, split)
    if rows is None:
        return [_load_shard(path) for path in _paths_by_name(folder, split)]
    return [_with_missing(_load_shard(folder / row.name), row.num_samples) for row in rows]


def _with_missing(shard: _Shard, num_samples: int) -> _Shard:
    """Add a loss for samples of which nothing is left in the tar: only index.json knows of them."""
    if len(shard.keys) + len(shard.losses) >= num_samples:
        return shard
    return shard._replace(losses=[*shard.losses, Loss(shard.path.name, "", "missing_samples")])


def _load_remote(folder: str, split: str, cache: Cache | None) -> list[_Shard]:
    """Load the shards that the index.json there names; their offsets files are required."""
    check_url(folder)
    rows = _shards_of(fetch_json(f"{folder}index.json"), f"{shown(folder)}index.json", split)
    if not rows or gives_ranges(folder + rows[0].name, rows[0].size):
        cache = None
    elif cache is None:
        raise DataError(f"{shown(folder)}: the server does not support ranges. Set data.cache_dir to a local folder")
    else:
        cache.folder.mkdir(parents=True, exist_ok=True)
        cache.check_room(sum(row.size for row in rows if not (cache.folder / f"{row.sha256}.tar").exists()))

    def load(row: _Row) -> _Shard:
        url = f"{folder}{Path(row.name).with_suffix('.json')}"
        shard = RemoteShard(folder + row.name, row.size, row.sha256, cache)
        try:
            return _shard_of_offsets(fetch_json(url), shard, row.size)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{shown(url)}: {error}; expected the offsets of {row.name}. Upload the whole build again"
            ) from None

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(load, rows))


def _rows_by_index(folder: Path, split: str) -> list[_Row] | None:
    """Return the shards that index.json names; None if shards/build.py did not write these shards."""
    path = folder / "index.json"
    if not path.is_file():
        if (folder / "build.json").is_file():
            raise DataError(
                f"{folder}: found an unfinished build; expected index.json. Run shards/build.py again to finish it"
            )
        return None
    content = read_json_file(path)
    if not isinstance(content, dict) or "splits" not in content:
        _log.info("%s was not written by shards/build.py; scanning the tars instead", path)
        return None
    rows = _shards_of(content, str(path), split)
    missing = [row.name for row in rows if not (folder / row.name).is_file()]
    if missing:
        raise DataError(
            f"{folder}: missing shards: {len(missing)} of {len(rows)}, such as {missing[0]}; expected all shards that "
            "index.json names. Copy them here, or build the shards again"
        )
    return rows


def _shards_of(content: Any, source: str, split: str) -> list[_Row]:
    """Return the shards of a split. Raises DataError if this is not an index.json of shards/build.py."""
    try:
        if content["version"] != INDEX_VERSION:
            found = f"found version {content['version']!r:.80}; expected {INDEX_VERSION}"
            raise DataError(f"{source}: {found}. Build the shards again")
        if split not in content["splits"]:
            raise DataError(f"{source}: found the splits {sorted(content['splits'])}; expected {split!r}")
        shards = content["splits"][split]["shards"]
        rows = [_Row(row["path"], row["size"], row["sha256"], row["num_samples"]) for row in shards]
        good = all(
            re.fullmatch(r"[\w-]+\.tar", row.name)
            and re.fullmatch("[0-9a-f]{64}", row.sha256)
            and all(type(number) is int for number in (row.size, row.num_samples))
            for row in rows
        )
        good = good and len({row.name for row in rows}) == len(rows)
        good = good and sum(row.num_samples for row in rows) == content["splits"][split]["num_samples"]
    except (KeyError, TypeError):
        good = False
    if not good:
        expected = "path, size, sha256 and num_samples of every shard, and their number of samples in total"
        raise DataError(f"{source}: found a damaged index; expected {expected}. Build the shards again")
    return rows


def _paths_by_name(folder: Path, split: str) -> list[Path]:
    paths = sorted(folder.glob(f"{split}-*.tar"))
    if paths:
        return paths
    names = sorted(path.name for path in folder.iterdir())
    if any(re.fullmatch(rf"{re.escape(split)}-.*\.(tgz|tar\..+)", name) for name in names):
        raise DataError(
            f"{folder}: found compressed tars; expected plain .tar, because samples are read in place. Decompress them"
        )
    found = ", ".join(names[:10]) or "nothing"
    raise DataError(f"{folder}: found {found}{' ...' if len(names) > 10 else ''}; expected shards named {split}-*.tar")


def _load_shard(path: Path) -> _Shard:
    size = path.stat().st_size
    offsets_path = path.with_suffix(".json")
    if offsets_path.is_file():
        try:
            return _shard_of_offsets(json.loads(offsets_path.read_bytes()), path, size)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            _log.warning("%s does not match %s (%s); scanning the tar instead", offsets_path.name, path, error)
    entries, losses = scan_tar(path)
    layout = hashlib.sha256(repr(entries).encode("utf-8", "backslashreplace")).hexdigest()
    return _shard_of_entries(path, entries, [_UNKNOWN] * len(entries), losses, f"{size}:{layout}")


def _shard_of_offsets(content: Any, path: Path | RemoteShard, size: int) -> _Shard:
    """Build a shard from its offsets file.

    Raises ValueError, KeyError or TypeError if it does not describe a tar of `size` bytes, sample by sample.
    """
    if content["size"] != size:
        raise ValueError(f"found offsets for {content['size']} bytes; expected {size}, the size of the tar")
    sha256 = str(content["sha256"])
    if isinstance(path, RemoteShard) and sha256 != path.sha256:
        raise ValueError(f"found sha256 {sha256:.64}; expected {path.sha256}, as in index.json")
    entries = [Entry(row["key"], row["ext"], *row["image"], *row["json"]) for row in content["samples"]]
    if len(entries) != content["num_samples"]:
        raise ValueError(f"num_samples: found {content['num_samples']}; expected {len(entries)}")
    for i, entry in enumerate(entries):
        good = isinstance(entry.key, str) and entry.ext in IMAGE_EXTENSIONS
        if not good or any(type(number) is not int for number in entry[2:]):
            raise ValueError(f"samples[{i}]: expected a key, an extension and four whole numbers")
        if (
            min(entry[2:]) < 0
            or max(entry.image_offset + entry.image_num_bytes, entry.json_offset + entry.json_num_bytes) > size
        ):
            raise ValueError(f"sample {entry.key!r} is outside the tar")
        if max(entry.image_num_bytes, entry.json_num_bytes) > MAX_MEMBER_BYTES:
            raise ValueError(f"sample {entry.key!r} is larger than {MAX_MEMBER_BYTES} bytes")
    questions = [_num_questions(row, i) for i, row in enumerate(content["samples"])]
    return _shard_of_entries(path, entries, questions, [], sha256)


def _num_questions(row: dict[str, Any], i: int) -> tuple[int, int]:
    """Return (num_targets, num_turns) of a sample; older offsets files do not have them."""
    if "num_questions" not in row:
        return _UNKNOWN
    num_targets, num_turns = row["num_questions"]
    if not all(type(number) is int and 0 <= number <= MAX_MEMBER_BYTES for number in (num_targets, num_turns)):
        raise ValueError(f"samples[{i}].num_questions: found {row['num_questions']!r:.80}; expected two whole numbers")
    return num_targets, num_turns


def _shard_of_entries(
    path: Path | RemoteShard, entries: list[Entry], questions: list[tuple[int, int]], losses: list[Loss], identity: str
) -> _Shard:
    """Store entries as arrays, which take a tenth of the memory for a million entries."""
    return _Shard(
        path,
        keys=np.array([entry.key.encode("utf-8", "backslashreplace") for entry in entries], dtype=np.bytes_),
        exts=np.array([entry.ext.encode() for entry in entries], dtype=np.bytes_),
        places=np.array([entry[2:] for entry in entries], dtype=np.int64).reshape(-1, 4),
        questions=np.array(questions, dtype=np.int32).reshape(-1, 2),
        losses=losses,
        identity=identity,
    )


def _join(split: str, names: list[str], weights: list[float], sources: list[list[_Shard]]) -> ShardIndex:
    shards = [shard for source in sources for shard in source]
    sizes = [sum(len(shard.keys) for shard in source) for source in sources]
    keys = [
        _prefixed(shard.keys, prefix)
        for source, prefix in zip(sources, _prefixes(names), strict=True)
        for shard in source
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
    )


def _prefixes(names: list[str]) -> list[str]:
    """Return the prefixes of the keys of each source; empty if there is one source."""
    if len(names) == 1:
        return [""]
    last = [Path(name).name for name in names]
    return [f"{name}/" if last.count(name) == 1 else f"{name}-{number}/" for number, name in enumerate(last)]


def _prefixed(keys: NDArray[np.bytes_], prefix: str) -> NDArray[np.bytes_]:
    return np.char.add(prefix.encode("utf-8", "backslashreplace"), keys) if prefix else keys


def _identity(weights: list[float], sources: list[list[_Shard]]) -> str:
    digests = []
    for shards in sources:
        lines = "\n".join(f"{shard.path.name} {shard.identity}" for shard in shards)
        digests.append(hashlib.sha256(lines.encode("utf-8", "backslashreplace")).hexdigest())
    if weights == [1.0]:
        return digests[0]
    lines = "\n".join(f"{weight} {digest}" for weight, digest in zip(weights, digests, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()
