"""Predict the splits that a build with default settings will assign to annotated photos."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path

from cogvlm_ft.shards.packing.split_plan import DEFAULT_SEED, SplitPlan, SplitRules
from cogvlm_ft.shards.packing.splits import SPLITS, shuffle_rank
from cogvlm_ft.shards.reviewing.sources import Item

_TABLES = """
PRAGMA journal_mode = OFF;
CREATE TABLE candidates (number INTEGER PRIMARY KEY, key TEXT, rank BLOB, image BLOB, given INTEGER);
CREATE TABLE positions (position INTEGER PRIMARY KEY, number INTEGER NOT NULL);
"""
_INDEX = "CREATE INDEX candidates_by_rank ON candidates (rank)"


class PlannedSplits:
    """The photos of a source in a temporary database, which SQLite keeps on disk if it is large."""

    def __init__(self) -> None:
        self._images: Path | None = None
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.executescript(_TABLES)
        self._database.execute("BEGIN")

    def add(self, items: Iterable[Item]) -> None:
        """Add candidates of annotations; those of shards have their split."""
        rows = []
        for item in items:
            if item.split is None:
                self._images = Path(item.place.folder)
                image = item.candidate.image
                given = -1 if item.stated_split is None else SPLITS.index(item.stated_split)
                rows.append((shuffle_rank(image, DEFAULT_SEED), image.encode("utf-8", "surrogatepass"), given))
        self._database.executemany("INSERT INTO candidates (key, rank, image, given) VALUES ('', ?, ?, ?)", rows)

    def by_image(self) -> dict[str, str]:
        """Return the split of every photo; call it once, after all are added."""
        if self._images is None:
            return {}
        self._database.execute(_INDEX)
        plan = SplitPlan(self._database, SplitRules(images=self._images), DEFAULT_SEED)
        plan.assign()
        return dict(plan.splits())

    def close(self) -> None:
        """Delete the database."""
        self._database.close()
