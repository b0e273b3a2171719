"""Load the tars of a split from where data.shards says they are: a folder or tars, on disk or on a server."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from cogvlm_ft.data.addresses import (
    beside,
    check_url,
    is_command,
    is_compressed,
    is_tar,
    is_url,
    joined,
    name_of,
    shown,
)
from cogvlm_ft.data.kept_scans import kept_scan
from cogvlm_ft.data.object_store import exists, matching, reads_ranges
from cogvlm_ft.data.remote import RangeFile, RemoteShard, fetch_json, size_by_range
from cogvlm_ft.data.shard import Shard, load_shard, shard_of_offsets, shard_of_scan
from cogvlm_ft.data.sources import check_once, locations, means_same, split_of_name, tars_of_split
from cogvlm_ft.data.tars import Loss, Scan, scan_file
from cogvlm_ft.data.versions import marks_of
from cogvlm_ft.data.whole_files import Cache, cached_tar, starts_compressed
from cogvlm_ft.errors import DataError
from cogvlm_ft.terminal import progress_bar

INDEX_VERSION = 1

_NUM_REQUESTS = 8  # at the same time

_log = logging.getLogger(__name__)

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class SplitChoice:
    """How a split is chosen among the tars of a source.

    setting: where the sources come from, for errors.
    by_name_only: tars without a split in their names do not belong to it; with False they do.
    takes_only_split: if a local folder has samples of one split only, that one is meant, whatever its name.
    runs_commands: a source may be a command (`pipe:`).
    """

    setting: str = "data.shards"
    by_name_only: bool = False
    takes_only_split: bool = False
    runs_commands: bool = False


class _Row(NamedTuple):
    """Entry of one shard in index.json."""

    name: str
    size: int
    sha256: str
    num_samples: int


def load_source(path: str, split: str, cache: Cache | None, choice: SplitChoice) -> list[Shard]:
    """Load one source of a setting."""
    if is_command(path) and not choice.runs_commands:
        raise DataError(
            f"{choice.setting}={shown(path)}: found a command; expected a folder or tars. A command is run only if it "
            "is given on the command line of a program in launch/"
        )
    places = locations(path)
    tars = [place for place in places if is_tar(place) and not Path(place).expanduser().is_dir()]
    folders = [place for place in places if place not in tars]
    if tars:
        tars = tars_of_split(tars, split, by_name_only=choice.by_name_only)
    found = _in_threads(lambda tar: _load_tar(tar, cache), tars)
    for folder in folders:
        if is_url(folder):
            found += _load_remote_folder(folder, split, cache)
        else:
            found += _load_folder(Path(folder).expanduser(), split, cache, choice)
    return found


def _in_threads(action: Callable[[T], U], parts: Sequence[T]) -> list[U]:
    if len(parts) < 2:
        return [action(part) for part in parts]
    with ThreadPoolExecutor(_NUM_REQUESTS) as pool:
        return list(progress_bar(pool.map(action, parts), desc="index shards", unit="tar", total=len(parts)))


def _load_tar(tar: str, cache: Cache | None) -> Shard:
    """Load one tar that is named by itself."""
    if is_command(tar):
        return load_shard(cached_tar(tar, cache, "the output of a command cannot be read in place"), cache)
    if is_url(tar):
        return _load_remote_tar(tar, cache)
    return _load_local_tar(Path(tar).expanduser(), cache)


def _load_local_tar(path: Path, cache: Cache | None) -> Shard:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "a pipe or a device" if path.exists() else "nothing"
        raise DataError(f"{path}: found {found}; expected a tar, a regular file. Check the path")
    if is_compressed(path.name) or (cache is not None and starts_compressed(path)):
        why = "found a compressed tar; expected a plain .tar, because samples are read in place. Decompress it"
        path = cached_tar(str(path), cache, why)
    return load_shard(path, cache)


def _load_remote_tar(url: str, cache: Cache | None) -> Shard:
    """Load a tar by range, by its offsets file if it is one of ours; else through the cache."""
    check_url(url)
    size = None if is_compressed(url) else size_by_range(url)
    if size is None:
        why = (
            "cannot be read in place: it is compressed" if is_compressed(url) else "the server does not support ranges"
        )
        return load_shard(cached_tar(url, cache, why), cache)
    shard = RemoteShard(url, size, "", None)
    described = _offsets_of(url)
    if described is not None and described.get("size") == size:
        try:
            return shard_of_offsets(described, RemoteShard(url, size, str(described["sha256"]), None), size)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            _log.warning("%s: its offsets file does not match (%s); scanning the tar instead", shard, error)
    return shard_of_scan(shard, _remote_scan(shard, cache), size)


def _remote_scan(shard: RemoteShard, cache: Cache | None) -> Scan:
    """Scan a tar on a server; the result is kept if the server names the version of the content."""
    url, size = shard.url, shard.size
    marks = marks_of(url)
    state = (size, *marks) if any(marks[:1]) else ()  # the first is ETag or generation; a date alone is too coarse
    file = RangeFile(url, size)
    return kept_scan(cache, str(shard), state, lambda: scan_file(file, size, shard.name, str(shard)))  # type: ignore[arg-type]


def _offsets_of(url: str) -> dict[str, Any] | None:
    """Return the offsets file beside a tar, or None if there is none."""
    try:
        found = fetch_json(beside(url, f"{Path(name_of(url)).stem}.json"))
    except DataError:
        return None
    return found if isinstance(found, dict) and "samples" in found else None


def _load_folder(folder: Path, split: str, cache: Cache | None, choice: SplitChoice) -> list[Shard]:
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise DataError(
            f"{folder}: found {found}; expected a folder of WebDataset shards. Write them with shards/build.py"
        )
    if choice.takes_only_split:
        split = _only_split(folder) or split
    rows = _rows_by_index(folder, split)
    if rows is None:
        paths = list(_paths_by_name(folder, split, cache))
        return [_load_local_tar(path, cache) for path in progress_bar(paths, desc="index shards", unit="tar")]
    shown = progress_bar(rows, desc="index shards", unit="tar")
    return [_with_missing(load_shard(folder / row.name), row.num_samples) for row in shown]


def _only_split(folder: Path) -> str | None:
    """Return the split of a folder that has samples of one split only."""
    try:
        content = json.loads((folder / "index.json").read_bytes())
        splits = {name for name, part in content["splits"].items() if part["num_samples"]}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):  # not a build, or damaged
        splits = {path.name.partition("-")[0] for path in folder.glob("*-*.tar")}
    return splits.pop() if len(splits) == 1 else None


def _with_missing(shard: Shard, num_samples: int) -> Shard:
    """Add a loss for samples of which nothing is left in the tar: only index.json knows of them."""
    if len(shard.keys) + len(shard.losses) >= num_samples:
        return shard
    return shard._replace(losses=[*shard.losses, Loss(shard.path.name, "", "missing_samples")])


def _load_remote_folder(folder: str, split: str, cache: Cache | None) -> list[Shard]:
    """Load the shards that the index.json there names; in an object store without one, the tars by their names."""
    check_url(folder)
    index_url = joined(folder, "index.json")
    if reads_ranges(folder) and not exists(index_url):
        found = matching(joined(folder, f"{split}-*.tar"))
        if not found:
            raise DataError(f"{shown(folder)}: found neither index.json nor {split}-*.tar; expected shards")
        return _in_threads(lambda url: _load_remote_tar(url, cache), found)
    rows = _shards_of(_fetch_index(index_url), shown(index_url), split)
    if rows and (size := size_by_range(joined(folder, rows[0].name))) is not None:
        if size != rows[0].size:
            raise DataError(
                f"{shown(joined(folder, rows[0].name))}: found {size} bytes; expected {rows[0].size}. Check that the "
                "tar and its index.json are from the same build"
            )
        cache = None
    elif rows and cache is None:
        raise DataError(f"{shown(folder)}: the server does not support ranges. Set data.cache_dir to a local folder")
    elif rows and cache is not None:
        cache.folder.mkdir(parents=True, exist_ok=True)
        cache.check_room(sum(row.size for row in rows if not (cache.folder / f"{row.sha256}.tar").exists()))
    return _in_threads(lambda row: _load_row(folder, row, cache), rows)


def _fetch_index(url: str) -> Any:
    try:
        return fetch_json(url)
    except DataError as error:
        raise DataError(
            f"{error}. Shards of other programs: name the tars, such as .../train-{{000000..000003}}.tar"
        ) from None


def _load_row(folder: str, row: _Row, cache: Cache | None) -> Shard:
    """Load a shard that index.json names; its offsets file is required."""
    url = joined(folder, str(Path(row.name).with_suffix(".json")))
    shard = RemoteShard(joined(folder, row.name), row.size, row.sha256, cache)
    try:
        return shard_of_offsets(fetch_json(url), shard, row.size)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{shown(url)}: {error}; expected the offsets of {row.name}. Upload the whole build again"
        ) from None


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
    known = {row.name for row in rows}
    others = sorted(path.name for path in folder.glob(f"{split}-*") if is_tar(path.name) and path.name not in known)
    if others:
        _log.warning(
            "%s: tars that are not read: %d, such as %s: index.json does not name them. Move them to another folder",
            folder,
            len(others),
            others[0],
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


def _paths_by_name(folder: Path, split: str, cache: Cache | None) -> list[Path]:
    paths = sorted(path for path in folder.glob(f"{split}-*") if is_tar(path.name))
    compressed = [path for path in paths if is_compressed(path.name)]
    if compressed and cache is None:
        raise DataError(
            f"{compressed[0]}: found a compressed tar; expected plain .tar, because samples are read in place. "
            "Decompress it, or set data.cache_dir to a local folder with room for it"
        )
    if paths:
        check_once(str(folder), list(map(str, paths)))
        _report_others(folder, split)
        return paths
    names = sorted(path.name for path in folder.iterdir())
    found = ", ".join(names[:10]) or "nothing"
    tars = [name for name in names if is_tar(name)]
    others = (
        f". Tars with other names can be named themselves, such as {folder}/{tars[0]} or {folder}/*.tar" if tars else ""
    )
    if not tars and any(is_tar(path.name) for path in folder.glob("*/*")):
        others = f". Tars in the folders below can be named themselves, such as {folder}/*/*.tar"
    raise DataError(
        f"{folder}: found {found}{' ...' if len(names) > 10 else ''}; expected shards named {split}-*.tar{others}"
    )


def _report_others(folder: Path, split: str) -> None:
    """Warn of tars that belong to no split. Raises DataError for those of the same split with other names."""
    tars = [path.name for path in sorted(folder.iterdir()) if is_tar(path.name) and not path.name.startswith(".")]
    words = {name: split_of_name(name, split) for name in tars}
    same = [name for name in tars if means_same(words[name], split) and not name.startswith(f"{split}-")]
    if same:
        raise DataError(
            f"{folder / same[0]}: found beside tars named {split}-; expected names of the split {split!r} that all "
            f"begin with {split}-. Rename it, move it away, or name the tars themselves in data.shards"
        )
    others = [name for name in tars if not words[name]]
    if others:
        _log.warning(
            "%s: tars that are not read: %d, such as %s: names of the split %r begin with %s-. Rename "
            "them, or name tars themselves in data.shards",
            folder,
            len(others),
            others[0],
            split,
            split,
        )


def read_json_file(path: Path) -> Any:
    """Return the JSON in a file. Raises DataError if it is not valid."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}; expected valid JSON. Build the shards again with --overwrite") from None
