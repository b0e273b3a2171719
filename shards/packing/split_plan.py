"""Assign every photo of a staging database to a split; copies of one photo are never in two splits.

The result depends on the names and contents of the photos, the splits that the user's files state, and the settings,
not on the order of the annotations.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cogvlm_ft.data.tars import MAX_MEMBER_BYTES
from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.packing.candidates import Rejected
from cogvlm_ft.shards.packing.files import read_inside
from cogvlm_ft.shards.packing.source_photos import GroupBy
from cogvlm_ft.shards.packing.splits import SPLITS, shuffle_rank

DEFAULT_VAL_FRACTION = 0.1
DEFAULT_SEED = 0
_TRAIN, _VAL, _TEST = range(len(SPLITS))
_UNSTATED = -1
_NUM_LAST_BYTES = 4096
_TABLES = """
CREATE TABLE photos (
    rank BLOB NOT NULL, image BLOB NOT NULL, name BLOB NOT NULL, common BLOB NOT NULL, is_copy INTEGER NOT NULL,
    given INTEGER NOT NULL, num_bytes INTEGER
);
"""
_INDEXES = """
CREATE INDEX photos_by_rank ON photos (rank);
CREATE INDEX photos_by_name ON photos (name);
CREATE INDEX photos_by_size ON photos (num_bytes);
"""
_JOIN_COPIES = """
CREATE INDEX photos_by_common ON photos (common) WHERE NOT is_copy;
CREATE TABLE copies AS SELECT rank, coalesce(
    (SELECT o.name FROM photos o WHERE NOT o.is_copy AND o.name = p.name LIMIT 1),
    (SELECT min(o.name) FROM photos o WHERE NOT o.is_copy AND o.common = p.common HAVING count(DISTINCT o.name) = 1),
    p.common) AS name FROM photos p WHERE is_copy;
UPDATE photos SET name = (SELECT c.name FROM copies c WHERE c.rank = photos.rank) WHERE is_copy;
DROP TABLE copies;
"""
"""A copy belongs to the photo in its folder, else to the only one of that name elsewhere, else to the other copies."""
_GROUPS = """
CREATE TABLE groups AS SELECT name, count(*) AS num_photos, max(given) AS split,
    CASE WHEN count(*) = 1 THEN min(rank) ELSE shuffle_rank(min(image)) END AS rank FROM photos GROUP BY name;
CREATE UNIQUE INDEX groups_by_name ON groups (name);
CREATE INDEX groups_by_rank ON groups (rank);
"""
_POSITIONS = """
INSERT INTO positions
SELECT row_number() OVER (ORDER BY CASE g.split WHEN 1 THEN -1 ELSE g.split END, c.rank, c.key) - 1, c.number
FROM candidates c JOIN photos p USING (rank) JOIN groups g USING (name)
"""
"""Position of each split in the order of the shards: val first."""


@dataclass(frozen=True)
class SplitRules:
    """How photos are split. val_fraction: None if the user gave none.

    split: a value of SPLIT_CHOICES. images: the folder of the photos, to compare their contents; None: not compared.
    """

    val_fraction: float | None = None
    split: str = "auto"
    group_by: str = "photo"
    images: Path | None = None


@dataclass
class SplitReport:
    """The decisions about the split, for index.json and the summary.

    kept: the user's splits are used. stated: number of photos by stated split; "none" without one.
    num_grouped, num_groups: photos of groups of two or more, and these groups; largest: the largest one.
    num_identical: photos with the content of another one. num_moved: photos that follow a copy into its split.
    num_unmatched: photos that the expression of --group-by does not match.
    """

    kept: bool
    stated: dict[str, int]
    val_fraction: float | None
    num_grouped: int = 0
    num_groups: int = 0
    largest: int = 0
    largest_name: str = ""
    num_identical: int = 0
    num_moved: int = 0
    num_unmatched: int = 0
    sha256: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the entry for index.json."""
        return asdict(self)


@dataclass(frozen=True)
class Moved:
    """An image whose copy is stated to be in another split: it goes with it."""

    image: str
    stated: str
    split: str
    copy: str


def advice_on_splits(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    """Return what to do if stated splits are kept that an earlier build of the folder did not know; else empty.

    earlier, now: the contents of build.json.
    """
    kept_now = "split" not in earlier if "splitting" not in now else now["splitting"]["kept"]
    if not kept_now or (earlier.get("splitting") or {}).get("kept"):
        return ""
    return (
        "Splits that the files state are kept now; the earlier build split at random. Choose another --out for"
        " them, or add --overwrite; with --split random the photos are split at random as before."
    )


class SplitPlan:
    """Splits photos in the database of a build, whose candidates are all staged."""

    def __init__(self, database: sqlite3.Connection, rules: SplitRules, seed: int) -> None:
        self._database = database
        self._rules = rules
        self._group_by = GroupBy(rules.group_by)
        database.create_function("shuffle_rank", 1, lambda image: shuffle_rank(_text(image), seed), deterministic=True)

    def assign(self) -> tuple[list[int], SplitReport]:
        """Fill the table of positions; return the number of candidates by split, in the order of SPLITS."""
        self._list_photos()
        report = self._decide()
        if self._count("SELECT count(*) FROM photos WHERE is_copy"):
            self._run(_JOIN_COPIES)
        report.num_identical = self._join_identical()
        if not report.kept:
            self._run("UPDATE photos SET given = -1")
        self._run(_GROUPS)
        if report.val_fraction is not None:
            self._choose_val(report.val_fraction)
        self._run(f"UPDATE groups SET split = {_TRAIN} WHERE split = {_UNSTATED}")
        self._run(_POSITIONS)
        self._fill(report)
        return [self._num_candidates(split) for split in range(len(SPLITS))], report

    def splits(self) -> Iterator[tuple[str, str]]:
        """Yield every image with its split. Call `assign` first."""
        for image, split in self._database.execute("SELECT p.image, g.split FROM photos p JOIN groups g USING (name)"):
            yield _text(image), SPLITS[split]

    def moved(self) -> Iterator[Moved]:
        """Yield the images whose stated split is not that of their group."""
        rows = self._database.execute(
            "SELECT p.image, p.given, g.split, (SELECT min(o.image) FROM photos o WHERE o.name = p.name"
            " AND o.given = g.split) FROM photos p JOIN groups g USING (name)"
            " WHERE g.num_photos > 1 AND max(p.given, 0) < g.split AND EXISTS"
            " (SELECT 1 FROM photos o WHERE o.name = p.name AND o.given = g.split) ORDER BY p.image"
        )
        for image, given, split, copy in rows:
            yield Moved(_text(image), SPLITS[max(given, 0)], SPLITS[split], _text(copy))

    def _list_photos(self) -> None:
        self._run(_TABLES)
        rows = self._database.execute("SELECT rank, image, max(given) FROM candidates GROUP BY rank")
        self._database.executemany("INSERT INTO photos VALUES (?, ?, ?, ?, ?, ?, ?)", self._photo_rows(rows))
        self._run(_INDEXES)

    def _photo_rows(self, rows: Iterable[tuple[bytes, bytes, int]]) -> Iterator[tuple[Any, ...]]:
        images = self._rules.images
        for rank, image, given in rows:
            name = self._group_by.name(_text(image))
            num_bytes = None if images is None else _num_bytes(os.path.join(images, _text(image)))  # noqa: PTH118
            yield rank, image, _bytes(name.own), _bytes(name.common), name.is_copy, given, num_bytes

    def _decide(self) -> SplitReport:
        """Decide whether the stated splits are kept, and which fraction of the others becomes val."""
        counts = dict(self._database.execute("SELECT given, count(*) FROM photos GROUP BY given"))
        stated = {name: counts.get(number, 0) for number, name in enumerate(SPLITS)}
        stated["none"] = counts.get(_UNSTATED, 0)
        rules, choice = self._rules, self._rules.split
        found = [name for name, count in stated.items() if count]
        has_several = len(found) > 1 and bool(stated["val"] or stated["test"])
        if choice == "folders" and not has_several:
            detail = (
                f"found photos of {', '.join(found) or 'none'}; expected folders of two splits, such as train and val"
            )
            raise DataError(f"--split folders: {detail}. Choose --split train, val or test for the whole source.")
        kept = choice in (*SPLITS, "folders") or (choice == "auto" and has_several and rules.val_fraction is None)
        fraction = DEFAULT_VAL_FRACTION if rules.val_fraction is None else rules.val_fraction
        is_complete = kept and (choice in SPLITS or stated["val"] > 0)
        report = SplitReport(kept, stated, None if is_complete else fraction)
        report.num_unmatched = sum(stated.values()) - self._group_by.num_matches if self._group_by.is_pattern else 0
        return report

    def _join_identical(self) -> int:
        """Give photos of equal content one name; return their number."""
        images = self._rules.images
        if images is None:
            return 0
        joined, num_identical = _JoinedNames(), 0
        sizes = self._database.execute(
            "SELECT num_bytes FROM photos WHERE num_bytes > 0 GROUP BY num_bytes HAVING count(*) > 1 ORDER BY num_bytes"
        ).fetchall()
        for (num_bytes,) in sizes:
            rows = self._database.execute(
                "SELECT image, name FROM photos WHERE num_bytes = ? ORDER BY image", (num_bytes,)
            )
            for same in _identical(dict(rows), images):
                num_identical += len(same)
                joined.add(same)
        self._database.executemany("UPDATE photos SET name = ? WHERE name = ?", joined.renamed())
        return num_identical

    def _choose_val(self, fraction: float) -> None:
        """Choose groups in their order that fit into the fraction; if none does, the smallest of several."""
        unstated = f"WHERE split <= {_TRAIN}"
        (total,) = self._database.execute(f"SELECT coalesce(sum(num_photos), 0) FROM groups {unstated}").fetchone()
        num_missing = num_val = round(fraction * total)
        chosen: list[bytes] = []
        groups = self._database.execute(f"SELECT name, num_photos FROM groups {unstated} ORDER BY rank, name")
        for name, num_photos in groups:
            if not num_missing:
                break
            if num_photos <= num_missing:
                chosen.append(name)
                num_missing -= num_photos
        if num_val and not chosen:
            smallest = f"SELECT name, num_photos FROM groups {unstated} ORDER BY num_photos, rank LIMIT 1"
            name, num_photos = self._database.execute(smallest).fetchone()
            chosen += [name] if num_photos < total else []
        self._database.executemany(f"UPDATE groups SET split = {_VAL} WHERE name = ?", ((name,) for name in chosen))

    def _fill(self, report: SplitReport) -> None:
        several = "FROM groups WHERE num_photos > 1"
        row = self._database.execute(f"SELECT coalesce(sum(num_photos), 0), count(*) {several}").fetchone()
        report.num_grouped, report.num_groups = row
        largest = self._database.execute(f"SELECT num_photos, name {several} ORDER BY num_photos DESC, rank").fetchone()
        if largest:
            image = "SELECT min(image) FROM photos WHERE name = ?"
            report.largest = largest[0]
            report.largest_name = _text(self._database.execute(image, largest[1:]).fetchone()[0])
        report.num_moved = sum(1 for _ in self.moved())
        digest = hashlib.sha256()
        for (rank,) in self._database.execute(
            f"SELECT p.rank FROM photos p JOIN groups g USING (name) WHERE g.split <> {_TRAIN} ORDER BY g.split, p.rank"
        ):
            digest.update(rank)
        report.sha256 = digest.hexdigest()

    def _num_candidates(self, split: int) -> int:
        joined = "candidates c JOIN photos p USING (rank) JOIN groups g USING (name)"
        return self._count(f"SELECT count(*) FROM {joined} WHERE g.split = {split}")

    def _count(self, sql: str) -> int:
        number: int = self._database.execute(sql).fetchone()[0]
        return number

    def _run(self, statements: str) -> None:
        for statement in statements.split(";"):
            self._database.execute(statement)


class _JoinedNames:
    """Groups that have an image in common; each is known by its first name."""

    def __init__(self) -> None:
        self._first: dict[bytes, bytes] = {}

    def add(self, names: Iterable[bytes]) -> None:
        roots = sorted({self._root(name) for name in names})
        for root in roots:
            self._first[root] = roots[0]

    def _root(self, name: bytes) -> bytes:
        while (first := self._first.get(name, name)) != name:
            name = first
        return name

    def renamed(self) -> list[tuple[bytes, bytes]]:
        """Return (first name, name) of all names that change."""
        return [(root, name) for name in self._first if (root := self._root(name)) != name]


def _identical(name_of: dict[bytes, bytes], images: Path) -> Iterator[list[bytes]]:
    """Yield the group names of images with equal bytes; most differ at their ends, so that few are read completely."""
    for maybe in _by_digest(name_of, images, _NUM_LAST_BYTES):
        for same in _by_digest(maybe, images, None):
            yield [name_of[image] for image in same]


def _by_digest(among: Iterable[bytes], images: Path, num_last: int | None) -> list[list[bytes]]:
    by_digest: dict[bytes, list[bytes]] = defaultdict(list)
    for image in among:
        try:
            data = read_inside(images, _text(image), "image", MAX_MEMBER_BYTES, num_last=num_last)
        except Rejected:  # the build reports it
            continue
        by_digest[hashlib.blake2b(data, digest_size=16).digest()].append(image)
    return [same for same in by_digest.values() if len(same) > 1]


def _num_bytes(path: str) -> int | None:
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except (OSError, ValueError):
        return None


def _text(image: bytes) -> str:
    return image.decode("utf-8", "surrogatepass")


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")
