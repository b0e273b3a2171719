"""Read and write metrics.jsonl: one JSON object per line, written at once; traces of a killed attempt are removed."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cogvlm_ft.errors import DataError
from cogvlm_ft.plain_files import parse_json, read_bytes, replaced_file
from cogvlm_ft.tracking.auxiliary import report_failure

logger = logging.getLogger(__name__)

FULL_DISK_PATIENCE_S = 60
MAX_WAITING = 10_000  # rows that could not be written yet

Row = dict[str, Any]


def open_metrics(path: Path) -> None:
    """Create the file if there is none, and cut off a last line that a killed run left unfinished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    content = path.read_bytes()
    num_whole = content.rfind(b"\n") + 1
    if num_whole < len(content):
        logger.warning("%s: dropping its unfinished last line", path)
        os.truncate(path, num_whole)


class RowsFile:
    """Appends rows to a file. Rows that cannot be written now are kept and written with a later one.

    kind: of the rows, in the warning.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self._kind = kind
        self._waiting: list[str] = []

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, at once if possible. Never raises OSError."""
        patience_s = 0 if self._waiting else FULL_DISK_PATIENCE_S  # waits once, not at every step
        self._waiting += [_line(row) for row in rows]
        try:
            append_text(self.path, "".join(self._waiting), patience_s)
        except OSError as error:
            report_failure(self._kind, error)
            del self._waiting[:-MAX_WAITING]
        else:
            self._waiting = []


def _line(row: Mapping[str, Any]) -> str:
    values = {key: json_value(value) for key, value in row.items()}
    return json.dumps(values, allow_nan=False) + "\n"


def append_text(path: Path, text: str, patience_s: int = FULL_DISK_PATIENCE_S) -> None:
    """Append all of it or nothing. Waits while the disk is full: a checkpoint that did not fit is soon deleted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = path.stat().st_size if path.exists() else 0
    for seconds_left in reversed(range(patience_s + 1)):
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
            return
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not seconds_left:
                raise
            time.sleep(1)


def truncate_after(path: Path, step: int, evaluated_step: int | None = None) -> None:
    """Drop what comes after `step`, and summaries: a run resumed there records them again.

    evaluated_step: the last one that need not be evaluated again, where that is not `step`.
    """
    limits = {"val": step if evaluated_step is None else evaluated_step}
    with path.open(encoding="utf-8", errors="replace") as lines, replaced_file(path, "w") as rewritten:
        rewritten.writelines(line for line in lines if _is_done(_row_of(line, path), step, limits))


def _row_of(line: str, path: Path) -> Row:
    """Parse a row; return an empty one, which is dropped, if a power failure or a full disk damaged it."""
    try:
        row = parse_json(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        logger.warning("%s: dropping an unreadable line: %.80r", path, line)
        return {}
    return row


def _is_done(row: Row, step: int, limits: Mapping[str, int]) -> bool:
    return row.get("step", math.inf) <= limits.get(row.get("kind", ""), step)


def read_rows(path: Path) -> list[Row]:
    """Read the rows of one run in the order of its steps, evaluations before the next step, the summary last.

    Of several rows of one kind and step, left by several attempts, the last one counts. An unfinished last line is
    ignored.
    Raises DataError.
    """
    try:
        lines = read_bytes(path).decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; expected the metrics.jsonl of a run") from None
    rows: dict[tuple[float, str], Row] = {}
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = parse_json(line)
            rows[(row.get("step", math.inf), row["kind"])] = row
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{path}, line {number}: found {line[:80]!r}; expected a JSON object with a kind") from None
    return [rows[place] for place in sorted(rows)]  # "train" before "val": a step is taken, then evaluated


def json_value(value: Any) -> bool | int | float | str | None:
    """Convert a value to JSON: any number type becomes a float, NaN and infinity become null."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
