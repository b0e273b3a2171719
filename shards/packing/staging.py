"""Keep the candidates of a build in an SQLite file, so that memory does not grow with their number."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from cogvlm_ft.shards.packing.box_units import BoxUnits
from cogvlm_ft.shards.packing.candidate_json import candidate_from_json, to_json
from cogvlm_ft.shards.packing.candidates import Candidate, Problem
from cogvlm_ft.shards.packing.split_plan import SplitPlan, SplitReport, SplitRules
from cogvlm_ft.shards.packing.splits import SPLITS, ShardPlan, key_of, key_with_hash, plan_shards, shuffle_rank

_TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA cache_size = -32768;
CREATE TABLE candidates (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, rank BLOB NOT NULL, content TEXT NOT NULL,
    image BLOB NOT NULL, given INTEGER NOT NULL
);
CREATE TABLE context (number INTEGER PRIMARY KEY, rank BLOB NOT NULL, content TEXT NOT NULL);
CREATE TABLE problems (number INTEGER PRIMARY KEY, is_duplicate INTEGER NOT NULL, content TEXT NOT NULL);
CREATE TABLE positions (position INTEGER PRIMARY KEY, number INTEGER NOT NULL);
CREATE TABLE named_values (name TEXT PRIMARY KEY, content TEXT NOT NULL);
"""
_INDEXES = """
CREATE INDEX candidates_by_rank ON candidates (rank, key);
CREATE INDEX context_by_rank ON context (rank);
"""


class StagingDatabase:
    """Candidates, problems and named values of one build.

    One process writes it in one transaction; a file left by a killed build is replaced.
    """

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
        """Return the hash of everything that was added, in that order."""
        return self._hash.hexdigest()

    def add(self, part: Candidate | Problem) -> None:
        """Store a problem, or a candidate under a unique key; a candidate whose key is taken becomes duplicate_key."""
        content = to_json(part)
        self._hash.update(content.encode())
        self._hash.update(b"\n")
        if isinstance(part, Problem):
            self._add_problem(part, None)
            return
        key, owner = key_of(part), None
        if not self._insert(key, part, content):
            owner = self._owner(key)
            if part.key is None and owner.image != part.image:  # a.jpg and a.png are two images
                key = key_with_hash(key, part.image)
                owner = None if self._insert(key, part, content) else self._owner(key)
        if owner:
            hint = 'Give it another "key", or put all targets of one image on one line.'
            detail = f"key {key!r} is already used by {owner.image} ({owner.source}). {hint}"
            for problem in (*part.problems, Problem("sample", "duplicate_key", detail, part.source)):
                self._add_problem(problem, part.image)
            self.add_context(part)

    def add_context(self, candidate: Candidate) -> None:
        """Store a candidate that becomes no sample: its targets are still present in its image."""
        row = shuffle_rank(candidate.image, self._seed), to_json(candidate)
        self._database.execute("INSERT INTO context (rank, content) VALUES (?, ?)", row)

    def add_value(self, name: str, content: Any) -> None:
        """Store a JSON value under a name, for `read_value`."""
        self._database.execute("INSERT INTO named_values VALUES (?, ?)", (name, json.dumps(content)))

    def plan_shards(self, rules: SplitRules, *, samples_per_shard: int) -> tuple[list[ShardPlan], SplitReport]:
        """Split by photo, shuffle, and cut into shards; call it once. Raises DataError."""
        for statement in _INDEXES.splitlines():
            self._database.execute(statement)
        plan = SplitPlan(self._database, rules, self._seed)
        num_samples, report = plan.assign()
        for moved in plan.moved():
            detail = (
                f"{moved.image} is a copy of {moved.copy}, which is in {moved.split}: moved there from {moved.stated}"
            )
            self._add_problem(Problem("note", f"moved_to_{moved.split}", detail, moved.image), None)
        return plan_shards(dict(zip(SPLITS, num_samples, strict=True)), samples_per_shard), report

    def candidates(self) -> Iterator[Candidate]:
        """Yield the candidates with a unique key, in the order they were added."""
        for (content,) in self._database.execute("SELECT content FROM candidates ORDER BY number"):
            yield candidate_from_json(content)

    def settle_units(self, box_units: BoxUnits) -> None:
        """Convert all candidates to the decided units."""
        if box_units.is_as_read:
            return
        for table in ("candidates", "context"):
            select = f"SELECT number, content FROM {table} WHERE number > ? ORDER BY number LIMIT 1000"
            last = -1
            while rows := self._database.execute(select, (last,)).fetchall():
                last = rows[-1][0]
                settled = ((to_json(box_units.settle(candidate_from_json(content))), row) for row, content in rows)
                self._database.executemany(f"UPDATE {table} SET content = ? WHERE number = ?", settled)

    def by_image(self) -> Iterator[tuple[list[Candidate], list[Candidate]]]:
        """Yield for each image its candidates, and those of `add_context`. Call `plan_shards` first."""
        for (rank,) in self._database.execute("SELECT DISTINCT rank FROM candidates ORDER BY rank"):
            yield _of_image(self._database, rank)

    def commit(self) -> None:
        """End writing; from now on other processes may read."""
        self._database.execute("COMMIT")

    def problems(self) -> Iterator[tuple[Problem, str | None]]:
        """Yield the problems so far, with the image if it is known; duplicate keys come last."""
        for (content,) in self._database.execute("SELECT content FROM problems ORDER BY is_duplicate, number"):
            problem, image = json.loads(content)
            yield Problem(**problem), image

    def close(self) -> None:
        """Close and delete the file."""
        self._database.close()
        self.path.unlink(missing_ok=True)

    def _insert(self, key: str, candidate: Candidate, content: str) -> bool:
        given = -1 if candidate.split is None else SPLITS.index(candidate.split)
        image = candidate.image.encode("utf-8", "surrogatepass")
        row = key, shuffle_rank(candidate.image, self._seed), content, image, given
        sql = "INSERT INTO candidates (key, rank, content, image, given) VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
        return self._database.execute(sql, row).rowcount == 1

    def _add_problem(self, problem: Problem, image: str | None) -> None:
        sql = "INSERT INTO problems (is_duplicate, content) VALUES (?, ?)"
        self._database.execute(sql, (image is not None, to_json([problem, image])))

    def _owner(self, key: str) -> Candidate:
        (content,) = self._database.execute("SELECT content FROM candidates WHERE key = ?", (key,)).fetchone()
        return candidate_from_json(content)


class StagedSample(NamedTuple):
    """A candidate with its unique key.

    others: all other candidates of the same image, if requested.
    """

    key: str
    candidate: Candidate
    others: list[Candidate]


def read_staged_samples(path: Path, plan: ShardPlan, *, with_others: bool = False) -> Iterator[StagedSample]:
    """Yield the samples of a shard in order, from a committed file. Any process may call it."""
    rows = "SELECT key, rank, content FROM positions JOIN candidates USING (number) WHERE position BETWEEN ? AND ?"
    with closing(_connect(path)) as database:
        known, everything = b"", list[Candidate]()
        for key, rank, content in database.execute(f"{rows} ORDER BY position", (plan.first, plan.last - 1)):
            candidate = candidate_from_json(content)
            if with_others and rank != known:
                known, (kept, context) = rank, _of_image(database, rank)
                everything = [*kept, *context]
            yield StagedSample(key, candidate, [other for other in everything if other != candidate])


def read_value(path: Path, name: str) -> Any:
    """Return the value of `StagingDatabase.add_value`."""
    with closing(_connect(path)) as database:
        return json.loads(database.execute("SELECT content FROM named_values WHERE name = ?", (name,)).fetchone()[0])


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)


def _of_image(database: sqlite3.Connection, rank: bytes) -> tuple[list[Candidate], list[Candidate]]:
    kept = database.execute("SELECT content FROM candidates WHERE rank = ? ORDER BY key", (rank,))
    context = database.execute("SELECT content FROM context WHERE rank = ? ORDER BY number", (rank,))
    return [candidate_from_json(row[0]) for row in kept], [candidate_from_json(row[0]) for row in context]
