"""Write rejected.jsonl (rejected parts) and notes.jsonl (automatic decisions that lose nothing)."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from cogvlm_ft.plain_files import open_new
from cogvlm_ft.shards.packing.tar_writing import to_json_bytes, unfinished_path

PROBLEM_FILES = ("rejected.jsonl", "notes.jsonl")


class _Rows:
    """One file of rows. examples: the first row of each reason."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._counts: Counter[str] = Counter()
        self.examples: dict[str, dict[str, Any]] = {}

    @property
    def counts(self) -> dict[str, int]:
        """Return the number of rows by reason, in alphabetical order."""
        return dict(sorted(self._counts.items()))

    def add(self, row: dict[str, Any]) -> None:
        self._file.write(to_json_bytes(row) + b"\n")
        self._counts[row["reason"]] += 1
        self.examples.setdefault(row["reason"], row)


class ProblemFiles:
    """Both files; they appear in the folder when the block that writes them ends without an exception."""

    def __init__(self, out: Path) -> None:
        self._paths = [out / name for name in PROBLEM_FILES]
        self._open = ExitStack()

    def __enter__(self) -> ProblemFiles:
        files = [self._open.enter_context(open_new(unfinished_path(path))) for path in self._paths]
        self.rejected, self.notes = map(_Rows, files)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        if kind is None:
            for path in self._paths:
                unfinished_path(path).replace(path)

    def add(self, row: dict[str, Any]) -> None:
        """Write a row of `problem_row` to the file of its level."""
        (self.notes if row["level"] == "note" else self.rejected).add(row)
