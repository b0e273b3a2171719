"""The value of data.shards and data.val_shards: folders and tars, as users of WebDataset write them."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from cogvlm_ft.data.addresses import (
    check_host,
    check_slashes,
    check_url,
    is_command,
    is_tar,
    is_url,
    local_path,
    name_of,
    scheme_of,
    shown,
    unpacked_name,
)
from cogvlm_ft.data.object_store import matching
from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.plain_files import real_path

SEPARATOR = "::"  # between locations, as in WebDataset

_MAX_LOCATIONS, _MOST_DIGITS = 1_000_000, 18
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}")  # a step makes a range shorter, but is not counted
_SPLIT_WORD = re.compile(r"(train|training|val|valid|validation|dev|test|testing)[-_.]")
_SYNONYMS = ({"train", "training"}, {"val", "valid", "validation", "dev"}, {"test", "testing"})


@dataclass(frozen=True)
class ShardSource:
    """One of the shard sets of a run. weight: how often each of its samples is drawn per epoch.

    path: a folder, a tar, a pattern of tars, or several of these with `::` between them.
    """

    path: str
    weight: float = 1.0


def shard_sources(shards: object, setting: str = "data.shards") -> list[ShardSource]:
    """Parse the value of a setting. Raises ConfigError if it is not a location or a list of locations."""
    entries = shards if isinstance(shards, list) else [shards]
    sources = []
    for entry in entries:
        fields = entry if isinstance(entry, dict) else {"path": entry}
        path, weight = fields.get("path"), fields.get("weight", 1.0)
        good = isinstance(path, (str, Path)) and str(path) and set(fields) <= {"path", "weight"}
        if not good or isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= 1e6:
            expected = "a folder or tars, or a list of these or of {path: folder, weight: a number above 0}"
            raise ConfigError(f"{setting}: found {shown(repr(entry)):.200}; expected {expected}")
        sources.append(ShardSource(str(path), float(weight)))
    if not sources:
        raise ConfigError(f"{setting}: found an empty list; expected at least one folder or tar")
    if len(sources) > 1 and all(isinstance(entry, str) and is_tar(entry) for entry in entries):
        return [ShardSource(SEPARATOR.join(source.path for source in sources))]  # a list of tars is one shard set
    return sources


def locations(path: str) -> list[str]:
    """Return the folders and tars that a source names: `::`, braces, patterns and `file:` are resolved.

    Raises DataError if a pattern matches nothing, or if a location is named twice.
    """
    if is_command(path):
        return [path]
    found = [each for part in path.split(SEPARATOR) for each in _expanded(local_path(part))]
    check_once(path, found)
    return found


def check_once(source: str, found: Sequence[str]) -> None:
    """Raise DataError if a location is named twice: by two names of one file, or beside its compressed copy."""
    first: dict[str, str] = {}
    for each in found:
        file = each if is_url(each) else str(real_path(Path(each).expanduser()))
        other = first.setdefault(unpacked_name(file), each)
        if other is not each:
            what = "is named twice" if other == each else f"is {shown(other)} again"
            raise DataError(f"{shown(source)}: {shown(each)} {what}; expected every tar once. Keep or name one of them")


def _expanded(part: str) -> list[str]:
    if not is_url(part) and os.path.exists(Path(part).expanduser()):  # noqa: PTH110  False for what can be no path
        return [part]  # braces and brackets may be a part of its name
    check_slashes(part)
    too_many = f"{shown(part)}: found braces for more than {_MAX_LOCATIONS} names; expected fewer. Correct the numbers"
    if any(_num_names(*ends) > _MAX_LOCATIONS for ends in _RANGE.findall(part)):  # braceexpand would list them all
        raise DataError(too_many)
    try:
        names = list(islice(braceexpand(part, escape=False), _MAX_LOCATIONS + 1))
    except ValueError:
        raise DataError(f"{shown(part)}: found unbalanced braces; expected a form like {{000000..000003}}") from None
    if len(names) > _MAX_LOCATIONS:
        raise DataError(too_many)
    return [each for name in names for each in _matching(name)]


def _num_names(start: str, end: str) -> float:
    return float("inf") if max(len(start), len(end)) > _MOST_DIGITS else abs(int(end) - int(start)) + 1


def _matching(pattern: str) -> list[str]:
    """Return the files that a pattern with * ? [ ] matches; other paths are returned unchanged."""
    if is_url(pattern):
        check_host(pattern)
        if scheme_of(pattern) not in ("s3", "gs") or not re.search(r"[*\[]", pattern):
            check_url(pattern)
            return [pattern]
        found = matching(pattern)
    elif re.search(r"[*?\[]", pattern):
        found = sorted(map(str, _matching_paths(Path(pattern).expanduser())))
    else:
        return [pattern]
    if not found:
        raise DataError(f"{shown(pattern)}: found nothing that matches; expected tars. Check the folder and the name")
    return found


def _matching_paths(pattern: Path) -> list[Path]:
    """Return what matches a pattern with * ? [ ] as in a shell: hidden files are left out.

    Raises DataError if a folder cannot be read, whose tars would be missing in silence.
    """
    if not re.search(r"[*?\[]", str(pattern)):
        return [pattern] if pattern.exists() else []
    if "**" in pattern.parts:
        return [path for path in Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))) if _is_shown(path)]
    found: list[Path] = []
    for folder in _matching_paths(pattern.parent):
        try:
            names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        except OSError as error:
            raise DataError(f"{folder}: {error.strerror}; expected a folder that can be read. Check it") from None
        found += [folder / name for name in fnmatch.filter(names, pattern.name) if _is_shown(Path(name))]
    return found


def _is_shown(path: Path) -> bool:
    """Return whether a file is not hidden; macOS and interrupted copies leave ._train-0.tar, .train-0.tar."""
    return not path.name.startswith(".")


def split_of_name(location: str, split: str) -> str:
    """Return the split that a name begins with, such as `train` in train-000000.tar; "" if none.

    What means the same as `split` is `split`: validation_0.tar belongs to `val`. Raises nothing.
    """
    name = name_of(location)
    if re.match(rf"{re.escape(split)}[-_.]", name):
        return split
    found = _SPLIT_WORD.match(name)
    return found[1] if found else ""


def means_same(word: str, split: str) -> bool:
    """Return whether two words name the same split."""
    return word == split or any({word, split} <= group for group in _SYNONYMS)


def tars_of_split(tars: list[str], split: str, *, by_name_only: bool) -> list[str]:
    """Return the tars of a split: by their names, as in a folder, else all of them.

    by_name_only: tars without a split in their names belong to another one. Raises DataError if none belong to it, or
    if it is not certain which do.
    """
    words = [split_of_name(tar, split) for tar in tars]
    named = [tar for tar, word in zip(tars, words, strict=True) if means_same(word, split)]
    if any(words) and not all(words):
        example = next(tar for tar, word in zip(tars, words, strict=True) if (not word) == bool(named))
        raise DataError(
            f"{shown(example)}: found beside tars of other splits; expected names that all begin with a split, such as "
            f"{split}-, or none. Name the tars of one split only"
        )
    kinds = sorted({word for word in words if means_same(word, split)})
    if len(kinds) > 1:
        raise DataError(
            f"{shown(named[0])}: found tars of {' and of '.join(kinds)}; expected one of them for the split {split!r}. "
            "Name the tars of one split only"
        )
    if named:
        return named
    if len(set(words)) > 1:
        raise DataError(
            f"{shown(tars[0])}: found tars of {', '.join(sorted(set(words)))}; expected some of the split {split!r}, "
            f"whose names begin with {split}-. Name the tars of one split only"
        )
    if by_name_only:
        raise DataError(
            f"{shown(tars[0])}: found no tar of the split {split!r}, whose names begin with {split}-; expected some. "
            "Set data.val_shards to tars or a folder for validation"
        )
    return tars
