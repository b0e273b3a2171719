"""Suspects: parts of the annotations that are or may be wrong, and the images that show them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from heapq import nsmallest
from typing import Any

from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.packing.candidates import Problem
from cogvlm_ft.shards.reviewing.sources import Place
from cogvlm_ft.shards.reviewing.suspect_texts import NOTE, texts_of


@dataclass(frozen=True)
class View:
    """One image of a suspect.

    part: what a decision about this view applies to (`packing/decisions.py`), or None.
    phrase, language, as_read: of that part; its boxes as in the annotation, in `units`.
    marked, others, instead: boxes in pixels: the suspicious ones, the others, and those of another reading.
    upright: show it rotated by its EXIF orientation, with its boxes on that.
    """

    image: str
    source: str
    place: Place
    part: str | None = None
    phrase: str | None = None
    language: str | None = None
    units: str = "pixels"
    as_read: tuple[Box, ...] = ()
    marked: tuple[Box, ...] = ()
    others: tuple[Box, ...] = ()
    instead: tuple[Box, ...] = ()
    upright: bool = False


@dataclass(frozen=True)
class Suspect:
    """level: "source", "sample", "target", "box", "turn" or "note". values: fill the sentences of its kind.

    copies: of identical photos, the parts to drop if one is to stay.
    """

    id: str
    kind: str
    level: str
    source: str
    values: dict[str, Any] = field(default_factory=dict)
    views: tuple[View, ...] = ()
    copies: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the parts to which a decision about the whole kind applies."""
        return self.copies or tuple(view.part for view in self.views[:1] if view.part)

    def detail(self, language: str) -> str:
        """Describe what was found."""
        if "detail" in self.values:  # a message of the reader
            return str(self.values["detail"])
        return texts_of(self.kind).detail[language].format_map(self.values)

    @property
    def rank(self) -> bytes:
        """Return the order in which suspects get a picture: a fair draw that depends on nothing else."""
        return blake2b(self.id.encode("utf-8", "surrogatepass"), digest_size=8).digest()

    def row(self) -> dict[str, Any]:
        """Return a line of suspects.jsonl."""
        return {
            "id": self.id,
            "kind": self.kind,
            "level": self.level,
            "source": self.source,
            "detail": self.detail("en"),
            "photos": [
                {"image": view.image, "part": view.part, "phrase": view.phrase, "boxes": view.as_read}
                for view in self.views
            ],
        }


def suspect_of_problem(problem: Problem, views: tuple[View, ...] = ()) -> Suspect:
    """Report a part that a reader left out, or a note; no decision can be made about it."""
    text = f"{problem.source}\0{problem.reason}\0{problem.detail}"
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    kind = NOTE + problem.reason if problem.is_note else problem.reason
    name = f"left-out-{digest}.{problem.reason}"
    return Suspect(name, kind, problem.level, problem.source, {"detail": problem.detail}, views)


@dataclass(frozen=True)
class Chosen:
    """The suspects of one kind on the page: those with pictures, and those without."""

    pictured: list[Suspect] = field(default_factory=list)
    listed: list[Suspect] = field(default_factory=list)


def draw_fairly(suspects: dict[str, list[Suspect]], num_views: int, num_listed: int) -> dict[str, Chosen]:
    """Select suspects for the page, one of every kind in turn.

    num_views: the most views that get a picture, in total. num_listed: the most suspects without pictures.
    """
    waiting = {kind: sorted(found, key=lambda suspect: suspect.rank)[::-1] for kind, found in suspects.items()}
    chosen: dict[str, Chosen] = {kind: Chosen() for kind in suspects}
    while any(waiting.values()):
        for kind, found in waiting.items():
            if found:
                suspect = found.pop()
                if suspect.views and len(suspect.views) <= num_views:
                    num_views -= len(suspect.views)
                    chosen[kind].pictured.append(suspect)
                elif num_listed:
                    num_listed -= 1
                    chosen[kind].listed.append(suspect)
                elif not num_views:
                    waiting[kind] = []
    return chosen


def smallest(suspects: Iterable[Suspect], count: int) -> list[Suspect]:
    """Return the suspects that a fair draw selects first."""
    return nsmallest(count, suspects, key=lambda suspect: suspect.rank)
