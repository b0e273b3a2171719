"""Annotation formats. A format is one file with one function: path of the annotations -> `Annotations`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shards.candidates import Annotations
from shards.formats.coco import read_coco
from shards.formats.jsonl import read_jsonl

READERS: dict[str, Callable[[Path], Annotations]] = {"coco": read_coco, "jsonl": read_jsonl}
"""By the name that --format takes."""
