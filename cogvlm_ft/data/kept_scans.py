"""Results of scans in `data.cache_dir`, so that the next start of a run needs no scan of the same tars."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from cogvlm_ft.data import tars
from cogvlm_ft.data.tars import Entry, Loss, Scan
from cogvlm_ft.data.whole_files import Cache
from cogvlm_ft.plain_files import read_file, replaced_file

_log = logging.getLogger(__name__)


def kept_scan(cache: Cache | None, location: str, state: Sequence[object], scan: Callable[[], Scan]) -> Scan:
    """Return what `scan` finds in a tar, or what it found in the same file at an earlier start.

    state: what identifies the content of the file at this location; empty if nothing does. Without it, or without a
    cache, nothing is kept. A result that was not written as a whole, or by other rules, is not used.
    """
    if cache is None or not state:
        return scan()
    name = hashlib.sha256(json.dumps([_rules(), location, *state]).encode()).hexdigest()[:32]
    path = cache.folder / f"{name}.scan"
    found = _read(path)
    if found is None:
        found = scan()
        _write(path, found)
    return found


def state_of_file(status: os.stat_result) -> tuple[int, ...]:
    """Return what changes whenever a local file does. `touch` changes it too, and costs a scan."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@lru_cache(maxsize=1)
def _rules() -> str:
    """Identify the rules by which tars are scanned."""
    return hashlib.sha256(Path(tars.__file__).read_bytes()).hexdigest()


def _read(path: Path) -> Scan | None:
    try:
        digest, _, content = read_file(path).partition(b"\n")
        if digest.decode("ascii", "replace") != hashlib.sha256(content).hexdigest():
            return None
        entries, losses, notes = json.loads(content)
    except (OSError, ValueError):
        return None
    return Scan([Entry(*row) for row in entries], [Loss(*row) for row in losses], [Loss(*row) for row in notes])


def _write(path: Path, scan: Scan) -> None:
    content = json.dumps(scan).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as file:
            file.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    except FileNotFoundError:
        pass  # another process has written the same scan at this moment
    except OSError as error:
        _log.warning("data.cache_dir=%s cannot be written: %s; the next start scans the tars again", path.parent, error)
