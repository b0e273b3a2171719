"""What scans of tars found: losses that concern several tars, and what is logged."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cogvlm_ft.data.shard import Shard
from cogvlm_ft.data.tars import Loss

_log = logging.getLogger(__name__)
_NUMBERED = re.compile(r"(.*?)(\d{1,12})(\.tar.*)", re.IGNORECASE)


def explain_losses(shards: list[Shard]) -> list[Shard]:
    """Return the same shards; photo and record of one key in two of them are one loss that names both."""
    places: dict[tuple[str, str], list[str]] = {}
    for shard in shards:
        for loss in shard.losses:
            places.setdefault((loss.key, loss.reason), []).append(loss.shard)
    halves = {key for key, reason in places if reason == "no_json" and (key, "no_image") in places}
    if not halves:
        return shards
    return [shard._replace(losses=[_explained(loss, places, halves) for loss in shard.losses]) for shard in shards]


def _explained(loss: Loss, places: dict[tuple[str, str], list[str]], halves: set[str]) -> Loss:
    if loss.key not in halves or loss.reason not in ("no_json", "no_image"):
        return loss
    photo, record = places[loss.key, "no_json"][0], places[loss.key, "no_image"][0]
    detail = (
        f"the photo is in {photo}, its record in {record}; expected both in one tar. Write them one after the other"
    )
    return Loss(loss.shard, loss.key, "in_two_shards", detail)


def report_findings(split: str, sources: Sequence[Sequence[Shard]]) -> None:
    """Log what was lost, what was decided, and keys that several tars of a source have."""
    shards = [shard for source in sources for shard in source]
    for found, what in (
        ([loss for shard in shards for loss in shard.losses], "unusable samples"),
        ([note for shard in shards for note in shard.notes], "samples with a choice"),
    ):
        if found:
            counts = dict(Counter(loss.reason for loss in found))
            _log.warning("split %s: %s by reason: %s; first: %s", split, what, counts, text_of(found[0]))
    for source in sources:
        _report_repeated_keys(split, source)
        _report_gaps(split, [shard.path.name for shard in source])


def _report_gaps(split: str, names: Sequence[str]) -> None:
    """Warn of numbers that tars of one name leave out, such as after an interrupted copy."""
    groups: dict[tuple[str, int, str], set[int]] = {}
    for name in names:
        parts = _NUMBERED.fullmatch(name)
        if parts:
            groups.setdefault((parts[1], len(parts[2]), parts[3]), set()).add(int(parts[2]))
    for (before, width, after), numbers in groups.items():
        num_missing = max(numbers) - min(numbers) + 1 - len(numbers)
        if not 0 < num_missing <= len(numbers):  # more: a choice of tars
            continue
        first = next(number for number in range(min(numbers), max(numbers)) if number not in numbers)
        _log.warning(
            "split %s: numbers missing between those of the tars: %d, such as %s%0*d%s. Copy these tars, unless they "
            "were omitted intentionally",
            *(split, num_missing, before, width, first, after),
        )


def text_of(loss: Loss) -> str:
    """Return a loss or a note in one line."""
    return f"{loss.shard}: {loss.key or 'unknown key'}: {loss.reason}" + (f": {loss.detail}" if loss.detail else "")


def repeated_keys(shards: Sequence[Shard]) -> NDArray[np.bytes_]:
    """Return the keys that several tars have. One build of ours has none, and is not searched."""
    is_one_build = all((shard.questions >= 0).all() for shard in shards) and len({_folder(each) for each in shards}) < 2
    if is_one_build or len(shards) < 2:
        return np.zeros(0, np.bytes_)
    found, counts = np.unique(np.concatenate([shard.keys for shard in shards]), return_counts=True)
    return found[counts > 1]


def _folder(shard: Shard) -> str:
    return str(shard.path).rpartition("/")[0]


def _report_repeated_keys(split: str, shards: Sequence[Shard]) -> None:
    repeated = repeated_keys(shards)
    if not len(repeated):
        return
    names = [shard.path.name for shard in shards if (shard.keys == repeated[0]).any()]
    _log.warning(
        "split %s: keys that are in two tars: %d, such as %r in %s. They are read as different samples, whose keys "
        "begin with the name of their tar; if they are the same photos, remove one of them",
        split,
        len(repeated),
        bytes(repeated[0]).decode("utf-8", "backslashreplace"),
        " and ".join(names[:2]),
    )
