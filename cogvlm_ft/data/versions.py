"""Notice tars that are replaced while a run reads them: the offsets of their samples are those of the first content."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from cogvlm_ft.data.addresses import shown
from cogvlm_ft.errors import DataError

_first: dict[str, tuple[str, ...]] = {}  # by address; a loader process inherits those of its rank
_indexed: dict[Path, os.stat_result] = {}  # of local tars, when they were indexed; inherited too


def check_same(url: str, marks: tuple[str, ...]) -> None:
    """Raise DataError if the file at an address is no longer the one that this process read first.

    marks: what the server states about the content, such as ETag and date, in a fixed order; "" where it states
    nothing. Mirrors of one file may differ in one of them, so all must differ.
    """
    pairs = [(now, first) for now, first in zip(marks, _first.setdefault(url, marks), strict=True) if now and first]
    if pairs and all(now != first for now, first in pairs):
        now, first = pairs[0]
        raise DataError(
            f"{shown(url)}: found another file ({now}) than when it was read first ({first}); expected the same tar "
            "until the run ends. Restore it, or start a run with another output_dir"
        )


def note_indexed(path: Path, status: os.stat_result) -> None:
    """Note the state of a local tar for which offsets are about to be read."""
    _indexed[path] = status


def check_indexed(path: Path, status: os.stat_result) -> None:
    """Raise DataError if a local tar is no longer the one that was indexed: a later one of another size or inode."""
    first = _indexed.get(path)
    if first is None or first.st_mtime_ns == status.st_mtime_ns:
        return  # `touch` alone, against the clean-up of a scratch disk, changes no content
    if (first.st_ino, first.st_size) != (status.st_ino, status.st_size):
        raise DataError(
            f"{path}: found another file ({status.st_size} bytes) than when it was indexed ({first.st_size} bytes); "
            "expected the same tar until the run ends. Restore it, or start a run with another output_dir"
        )


class Noted(NamedTuple):
    """What one process knows about the content of files: by address, and of local tars when they were indexed."""

    marks: dict[str, tuple[str, ...]]
    states: dict[Path, os.stat_result]


def marks_of(url: str) -> tuple[str, ...]:
    """Return what the server stated about the content of a file when this process read it first; () if unread."""
    return _first.get(url, ())


def noted(files: Iterable[Any]) -> Noted:
    """Return what this process knows about tars: paths, or objects with an address `url`."""
    places = [getattr(file, "url", file) for file in files]
    marks = {place: _first[place] for place in places if place in _first}
    return Noted(marks, {place: _indexed[place] for place in places if place in _indexed})


def adopt(files: Noted) -> bool:
    """Note what another process of this node knows; return whether this one sees the same local tars."""
    for path, other in files.states.items():
        try:
            mine = path.stat()
        except OSError:
            return False
        if (mine.st_ino, mine.st_size, mine.st_mtime_ns) != (other.st_ino, other.st_size, other.st_mtime_ns):
            return False
    _indexed.update(files.states)
    for url, marks in files.marks.items():
        _first.setdefault(url, marks)
    return True
