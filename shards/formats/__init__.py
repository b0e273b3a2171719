"""Annotation formats. A format is one file: how to read it, and how to tell that a path holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.candidates import Candidate, Problem
from shards.formats.coco import read_coco
from shards.formats.jsonl import read_jsonl


@dataclass(frozen=True)
class Format:
    """read: (annotations, images folder) -> candidates, and problems that belong to none of them, one by one.

    Raises DataError if the annotations as a whole are something else.
    """

    read: Callable[[Path, Path], Iterator[Candidate | Problem]]


FORMATS: dict[str, Format] = {"coco": Format(read_coco), "jsonl": Format(read_jsonl)}
"""By the name that --format takes."""
