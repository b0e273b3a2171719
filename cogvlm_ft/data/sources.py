"""The value of data.shards and data.val_shards: folders and tars, as users of WebDataset write them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from cogvlm_ft.data.addresses import check_url, is_command, is_tar, is_url, local_path, name_of, scheme_of, shown
from cogvlm_ft.data.object_store import matching
from cogvlm_ft.errors import ConfigError, DataError

SEPARATOR = "::"  # between locations, as in WebDataset

_MAX_LOCATIONS = 1_000_000
_SPLIT_WORD = re.compile(r"(train|training|val|valid|validation|dev|test|testing)[-_.]")


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
    if len(set(found)) < len(found):
        twice = next(each for each in found if found.count(each) > 1)
        raise DataError(f"{shown(path)}: {shown(twice)} is named twice; expected every tar once")
    return found


def _expanded(part: str) -> list[str]:
    if not is_url(part) and Path(part).expanduser().exists():
        return [part]  # braces and brackets may be a part of its name
    try:
        names = list(islice(braceexpand(part, escape=False), _MAX_LOCATIONS))
    except ValueError:
        raise DataError(f"{shown(part)}: found unbalanced braces; expected a form like {{000000..000003}}") from None
    return [each for name in names for each in _matching(name)]


def _matching(pattern: str) -> list[str]:
    """Return what a pattern with * ? [ ] matches; what is no pattern, unchanged."""
    if is_url(pattern):
        if scheme_of(pattern) not in ("s3", "gs") or not re.search(r"[*\[]", pattern):
            check_url(pattern)
            return [pattern]
        found = matching(pattern)
    elif re.search(r"[*?\[]", pattern):
        path = Path(pattern).expanduser()
        found = sorted(str(each) for each in Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    else:
        return [pattern]
    if not found:
        raise DataError(f"{shown(pattern)}: found nothing that matches; expected tars. Check the folder and the name")
    return found


def tars_of_split(tars: list[str], split: str, *, by_name_only: bool) -> list[str]:
    """Return the tars of a split: by their names, as in a folder, else all of them.

    by_name_only: tars without a split in their names belong to another one. Raises DataError if none belong to it, or
    if only some have a split in their names.
    """
    named = [tar for tar in tars if name_of(tar).startswith(f"{split}-")]
    of_others = [tar for tar in tars if tar not in named and _SPLIT_WORD.match(name_of(tar))]
    if named and len(named) + len(of_others) == len(tars):
        return named
    if named or 0 < len(of_others) < len(tars):
        example = next(tar for tar in tars if tar not in named)
        raise DataError(
            f"{shown(example)}: found beside tars of other splits; expected names that all begin with a split, such as "
            f"{split}-, or none. Name the tars of one split only"
        )
    if by_name_only:
        raise DataError(
            f"{shown(tars[0])}: found no tar of the split {split!r}, whose names begin with {split}-; expected some. "
            "Set data.val_shards to tars or a folder for validation"
        )
    return tars
