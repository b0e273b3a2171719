"""Keep all images and phrases of a review on disk, for the rules that need all of them."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cogvlm_ft.grounding.metrics import match_iou
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.reviewing.label_words import MAX_LABELS, spelling_suspects
from cogvlm_ft.shards.reviewing.near_duplicates import HashedPhoto, near_duplicates
from cogvlm_ft.shards.reviewing.photo_rules import boxes_text, plain_phrase
from cogvlm_ft.shards.reviewing.planned_splits import PlannedSplits
from cogvlm_ft.shards.reviewing.sources import Item, Place
from cogvlm_ft.shards.reviewing.suspects import Suspect, View

_TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE photos (
    number INTEGER PRIMARY KEY, sha256 BLOB NOT NULL, split TEXT NOT NULL, image BLOB NOT NULL, content TEXT NOT NULL,
    look TEXT
);
CREATE TABLE phrases (phrase TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID;
"""
_COPIES = """
SELECT sha256, count(DISTINCT split), count(DISTINCT image) FROM photos
GROUP BY sha256 HAVING count(*) > 1 ORDER BY min(number)
"""
_ONE_OF_EACH_SPLIT_FIRST = """
SELECT content FROM photos WHERE sha256 = ? ORDER BY row_number() OVER (PARTITION BY split ORDER BY number), number
"""
_MAX_VIEWS = 4
_MAX_COMPARED_RECORDS = 50
"""Maximum number of records of one image that are compared."""
_MAX_COMPARED = 100
"""Maximum number of boxes of an image that are compared with those of its copy."""


class PhotoRow(NamedTuple):
    """An image with its targets. targets: (phrase, boxes in pixels). look: see `near_duplicates`."""

    sha256: bytes
    image: str
    source: str
    split: str | None
    part: str
    place: Place
    upright: bool
    targets: tuple[tuple[str, tuple[Box, ...]], ...]
    look: int | None = None

    def view(self) -> View:
        boxes = tuple(box for _, boxes in self.targets for box in boxes)
        return View(self.image, self.source, self.place, self.part, marked=boxes, upright=self.upright)


class Ledger:
    """A database that one process writes."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self.path = path
        self._planned = PlannedSplits()
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.executescript(_TABLES)
        self._database.execute("BEGIN")

    def add(self, items: Iterable[Item], photos: list[PhotoRow], phrases: Counter[str]) -> None:
        """Add one part of the source and its findings."""
        self._planned.add(items)
        rows = [
            (
                photo.sha256,
                photo.split or "",
                photo.image.encode("utf-8", "surrogatepass"),
                json.dumps([*photo[1:5], *photo.place.row(), photo.upright, photo.targets]),
                None if photo.look is None else str(photo.look),
            )
            for photo in photos
        ]
        self._database.executemany(
            "INSERT INTO photos (sha256, split, image, content, look) VALUES (?, ?, ?, ?, ?)", rows
        )
        add = "INSERT INTO phrases VALUES (?, ?) ON CONFLICT DO UPDATE SET count = count + excluded.count"
        safe = [(phrase.encode("utf-8", "backslashreplace").decode(), count) for phrase, count in phrases.items()]
        self._database.executemany(add, safe)

    def phrases(self, num_most: int) -> dict[str, Any]:
        """Return the number of distinct phrases, and the most frequent ones."""
        execute = self._database.execute
        (num_different, num_once) = execute(
            "SELECT count(*), count(*) FILTER (WHERE count = 1) FROM phrases"
        ).fetchone()
        rows = execute("SELECT phrase, count FROM phrases ORDER BY count DESC, phrase LIMIT ?", (num_most,))
        return {"different": num_different, "only_once": num_once, "most_frequent": [list(row) for row in rows]}

    def suspects(self) -> Iterator[Suspect]:
        """Yield identical images by their bytes, labels that are spelled alike, near-duplicates in two splits."""
        execute = self._database.execute
        execute("CREATE INDEX by_sha256 ON photos (sha256)")
        groups = execute(_COPIES)
        for digest, num_splits, num_images in groups:
            rows = execute(_ONE_OF_EACH_SPLIT_FIRST, (digest,))
            copies = (_photo_row(digest, content) for (content,) in rows)
            if num_splits > 1:
                yield _suspect_of_copies("train_and_val", list(copies))
            elif num_images > 1:
                yield _suspect_of_copies("same_photo", list(copies))
            else:
                yield from _contradictions(list(islice(copies, _MAX_COMPARED_RECORDS)))

        yield from spelling_suspects(self.labels())
        yield from self._near_duplicates()

    def labels(self) -> dict[str, int]:
        """Return the phrases with their counts; none if there are too many for labels."""
        rows = self._database.execute("SELECT phrase, count FROM phrases LIMIT ?", (MAX_LABELS + 1,)).fetchall()
        return dict(rows) if len(rows) <= MAX_LABELS else {}

    def _near_duplicates(self) -> Iterator[Suspect]:
        planned = self._planned.by_image()
        rows = self._database.execute(
            "SELECT min(number), split, image, look FROM photos WHERE look IS NOT NULL GROUP BY split, image ORDER BY 1"
        )
        photos = (
            HashedPhoto(number, split or planned[image.decode("utf-8", "surrogatepass")], int(look))
            for number, split, image, look in rows
        )
        for pair in near_duplicates(photos):
            found = [self._photo(photo.number) for photo in (pair.first, pair.second)]
            splits = pair.first.split, pair.second.split
            if found[0].sha256 != found[1].sha256:  # identical ones are reported already
                names = " and ".join(f"{row.image} ({split})" for row, split in zip(found, splits, strict=True))
                yield _suspect("near_duplicate", found, {"names": names, "bits": pair.num_bits})

    def _photo(self, number: int) -> PhotoRow:
        row = self._database.execute("SELECT sha256, content FROM photos WHERE number = ?", (number,)).fetchone()
        return _photo_row(*row)

    def close(self) -> None:
        """Delete the file."""
        self._planned.close()
        self._database.close()
        self.path.unlink(missing_ok=True)


def _photo_row(digest: bytes, content: str) -> PhotoRow:
    image, source, split, part, *place, upright, targets = json.loads(content)
    boxes = tuple((phrase, tuple(map(tuple, found))) for phrase, found in targets)
    return PhotoRow(digest, image, source, split, part, Place(*place), upright, boxes)


def _suspect_of_copies(kind: str, rows: list[PhotoRow]) -> Suspect:
    kept = rows[0].image, rows[0].split
    parts = tuple(row.part for row in rows if (row.image, row.split) != kept)
    names = [row.image if kind == "same_photo" else f"{row.image} ({row.split})" for row in rows[:10]]
    agreement = _agreement(rows[0], rows[1])
    values = {
        "count": len(rows),
        "names": ", ".join(names) + (" …" if len(rows) > len(names) else ""),
        "agreement": agreement[0],
        "agreement_zh": agreement[1],
    }
    return replace(_suspect(kind, rows, values), copies=parts)


def _contradictions(rows: list[PhotoRow]) -> Iterator[Suspect]:
    """Yield records of one file whose phrases have different boxes."""
    for row in rows[1:]:
        first, other = ({plain_phrase(phrase): boxes for phrase, boxes in each.targets} for each in (rows[0], row))
        phrase = next(
            (phrase for phrase in first if phrase in other and set(first[phrase]) != set(other[phrase])), None
        )
        if phrase is not None:
            values = {"phrase": phrase, "first": boxes_text(first[phrase]), "second": boxes_text(other[phrase])}
            yield _suspect("same_phrase", [row, rows[0]], values)


def _suspect(kind: str, rows: list[PhotoRow], values: dict[str, Any]) -> Suspect:
    views = tuple(row.view() for row in rows[:_MAX_VIEWS])
    return Suspect(f"{rows[0].part}.{kind}", kind, "sample", rows[0].source, values, views)


def _agreement(first: PhotoRow, second: PhotoRow) -> tuple[str, str]:
    """Describe how well the boxes of two copies agree, in English and Chinese."""
    a, b = ([box for _, boxes in row.targets for box in boxes] for row in (first, second))
    if not a or not b or max(len(a), len(b)) > _MAX_COMPARED:
        return "", ""
    if not np.isfinite(a + b).all():
        return "", ""
    if a == b:
        return " Their boxes are the same.", "框也相同。"
    iou = match_iou(a, b)
    return f" Their boxes differ (IoU {iou:.2f}).", f"框不同（IoU {iou:.2f}）。"
