"""The candidates of a build, on disk: a million of them need no more memory than a thousand."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cogvlm_ft.grounding.targets import Target, Turn
from cogvlm_ft.shards.packing.candidates import Candidate, Problem
from cogvlm_ft.shards.packing.splits import Slice, cut_into_slices, key_of, key_with_hash, shuffle_rank

_TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA cache_size = -32768;
CREATE TABLE candidates (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, rank BLOB NOT NULL, content TEXT NOT NULL
);
CREATE TABLE remembered (number INTEGER PRIMARY KEY, rank BLOB NOT NULL, content TEXT NOT NULL);
CREATE TABLE problems (number INTEGER PRIMARY KEY, is_duplicate INTEGER NOT NULL, content TEXT NOT NULL);
CREATE TABLE places (place INTEGER PRIMARY KEY, number INTEGER NOT NULL);
CREATE TABLE notes (name TEXT PRIMARY KEY, content TEXT NOT NULL);
"""
_INDEXES = """
CREATE INDEX candidates_by_rank ON candidates (rank, key);
CREATE INDEX remembered_by_rank ON remembered (rank);
"""


class Spool:
    """Written by one process in one go; what a killed build leaves is thrown away. `sha256` identifies its content."""

    def __init__(self, path: Path, seed: int) -> None:
        path.unlink(missing_ok=True)
        self.path = path
        self._seed = seed
        self._hash = hashlib.sha256()
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.executescript(_TABLES)
        self._database.execute("BEGIN")

    @property
    def sha256(self) -> str:
        """Of everything that was added, in that order."""
        return self._hash.hexdigest()

    def add(self, part: Candidate | Problem) -> None:
        """Keep a candidate under a key of its own, or lose it as duplicate_key; keep a problem."""
        content = _to_json(part)
        self._hash.update(content.encode())
        self._hash.update(b"\n")
        if isinstance(part, Problem):
            self._lose(part, None)
            return
        key, owner = key_of(part), None
        if not self._insert(key, part, content):
            owner = self._owner(key)
            if part.key is None and owner.image != part.image:  # a.jpg and a.png are two photos
                key = key_with_hash(key, part.image)
                owner = None if self._insert(key, part, content) else self._owner(key)
        if owner:
            hint = 'give it another "key", or put all targets of one image on one line'
            detail = f"key {key!r} is taken by {owner.image} ({owner.source}); {hint}"
            for problem in (*part.problems, Problem("sample", "duplicate_key", detail, part.source)):
                self._lose(problem, part.image)
            self.remember(part)

    def remember(self, candidate: Candidate) -> None:
        """What a candidate that becomes no sample says about its image: nothing of it is absent there."""
        row = shuffle_rank(candidate.image, self._seed), _to_json(candidate)
        self._database.execute("INSERT INTO remembered (rank, content) VALUES (?, ?)", row)

    def note(self, name: str, content: Any) -> None:
        """JSON for those who read the spool."""
        self._database.execute("INSERT INTO notes VALUES (?, ?)", (name, json.dumps(content)))

    def slices(self, *, val_fraction: float, samples_per_shard: int) -> list[Slice]:
        """Split by image, shuffle and cut. All candidates of one image are on the same side. To be asked once."""
        execute = self._database.execute
        for statement in _INDEXES.splitlines():
            execute(statement)
        execute("INSERT INTO places SELECT row_number() OVER (ORDER BY rank, key) - 1, number FROM candidates")
        num_images, num_samples = execute("SELECT count(DISTINCT rank), count(*) FROM candidates").fetchone()
        num_val_images = round(val_fraction * num_images)
        border = execute(
            "SELECT DISTINCT rank FROM candidates ORDER BY rank LIMIT 1 OFFSET ?", (num_val_images,)
        ).fetchone()
        num_val = num_samples
        if border:
            (num_val,) = execute("SELECT count(*) FROM candidates WHERE rank < ?", border).fetchone()
        return cut_into_slices(num_val, num_samples, samples_per_shard)

    def candidates(self) -> Iterator[Candidate]:
        """Those that have a key of their own, in the order they came."""
        for (content,) in self._database.execute("SELECT content FROM candidates ORDER BY number"):
            yield _candidate(json.loads(content))

    def photos(self) -> Iterator[tuple[list[Candidate], list[Candidate]]]:
        """For each image its candidates, and those that are only remembered. After `slices`."""
        for (rank,) in self._database.execute("SELECT DISTINCT rank FROM candidates ORDER BY rank"):
            yield _of_image(self._database, rank)

    def finish(self) -> None:
        """Nothing more is written; from now on others may read."""
        self._database.execute("COMMIT")

    def problems(self) -> Iterator[tuple[Problem, str | None]]:
        """What was lost so far, with its image if it had one; candidates with a taken key come last."""
        for (content,) in self._database.execute("SELECT content FROM problems ORDER BY is_duplicate, number"):
            problem, image = json.loads(content)
            yield Problem(**problem), image

    def close(self) -> None:
        """Delete the file."""
        self._database.close()
        self.path.unlink(missing_ok=True)

    def _insert(self, key: str, candidate: Candidate, content: str) -> bool:
        row = key, shuffle_rank(candidate.image, self._seed), content
        sql = "INSERT INTO candidates (key, rank, content) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
        return self._database.execute(sql, row).rowcount == 1

    def _lose(self, problem: Problem, image: str | None) -> None:
        sql = "INSERT INTO problems (is_duplicate, content) VALUES (?, ?)"
        self._database.execute(sql, (image is not None, _to_json([problem, image])))

    def _owner(self, key: str) -> Candidate:
        (content,) = self._database.execute("SELECT content FROM candidates WHERE key = ?", (key,)).fetchone()
        return _candidate(json.loads(content))


class Spooled(NamedTuple):
    """others: everything else that is said about the image, if that was asked for."""

    key: str
    candidate: Candidate
    others: list[Candidate]


def read_slice(path: Path, part: Slice, *, with_others: bool = False) -> Iterator[Spooled]:
    """The samples of a shard in their order, from a finished spool. For any process."""
    rows = "SELECT key, rank, content FROM places JOIN candidates USING (number) WHERE place BETWEEN ? AND ?"
    with closing(_connect(path)) as database:
        known, everything = b"", list[Candidate]()
        for key, rank, content in database.execute(f"{rows} ORDER BY place", (part.first, part.last - 1)):
            candidate = _candidate(json.loads(content))
            if with_others and rank != known:
                known, (kept, remembered) = rank, _of_image(database, rank)
                everything = [*kept, *remembered]
            yield Spooled(key, candidate, [other for other in everything if other != candidate])


def read_note(path: Path, name: str) -> Any:
    """What was noted."""
    with closing(_connect(path)) as database:
        return json.loads(database.execute("SELECT content FROM notes WHERE name = ?", (name,)).fetchone()[0])


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)


def _of_image(database: sqlite3.Connection, rank: bytes) -> tuple[list[Candidate], list[Candidate]]:
    kept = database.execute("SELECT content FROM candidates WHERE rank = ? ORDER BY key", (rank,))
    remembered = database.execute("SELECT content FROM remembered WHERE rank = ? ORDER BY number", (rank,))
    return [_candidate(json.loads(row[0])) for row in kept], [_candidate(json.loads(row[0])) for row in remembered]


def _fields(value: object) -> Any:
    if is_dataclass(value):
        return vars(value)
    assert isinstance(value, Path)
    return str(value)


_to_json = json.JSONEncoder(default=_fields).encode


def _candidate(fields: dict[str, Any]) -> Candidate:
    """As it was before `_to_json`: JSON knows neither tuples nor paths."""
    size, embedded_in = fields["stated_size_px"], fields["embedded_in"]
    fields["targets"] = tuple(_target(target) for target in fields["targets"])
    fields["turns"] = tuple(_turn(turn) for turn in fields["turns"])
    fields["problems"] = tuple(Problem(**problem) for problem in fields["problems"])
    fields["stated_size_px"] = size if size is None else tuple(size)
    fields["embedded_in"] = embedded_in if embedded_in is None else Path(embedded_in)
    return Candidate(**fields)


def _target(fields: dict[str, Any]) -> Target:
    fields["boxes_xyxy"] = tuple(tuple(box) for box in fields["boxes_xyxy"])
    return Target(**fields)


def _turn(fields: dict[str, Any]) -> Turn:
    fields["target"] = fields["target"] and _target(fields["target"])
    fields["history"] = tuple((prompt, answer) for prompt, answer in fields["history"])
    return Turn(**fields)
