"""Annotation formats: one file each, with a reader and a function that recognises the format."""

from __future__ import annotations

import codecs
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NoReturn

from cogvlm_ft.data.tars import IMAGE_EXTENSIONS
from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.formats.coco import read_coco, recognise_coco
from cogvlm_ft.shards.formats.coco_bboxes import CORNERS, SIZES
from cogvlm_ft.shards.formats.cogvlm_sft import read_cogvlm_sft, recognise_cogvlm_sft
from cogvlm_ft.shards.formats.csv_boxes import read_csv_boxes, recognise_csv_boxes
from cogvlm_ft.shards.formats.csv_columns import describe_missing
from cogvlm_ft.shards.formats.csv_text import first_line
from cogvlm_ft.shards.formats.cvat import read_cvat, recognise_cvat
from cogvlm_ft.shards.formats.folders import files_below
from cogvlm_ft.shards.formats.jsonl import read_jsonl, recognise_jsonl
from cogvlm_ft.shards.formats.label_studio import read_label_studio, recognise_label_studio
from cogvlm_ft.shards.formats.labelme import read_labelme, recognise_labelme
from cogvlm_ft.shards.formats.mdetr import read_mdetr, recognise_mdetr
from cogvlm_ft.shards.formats.odvg import read_odvg, recognise_odvg
from cogvlm_ft.shards.formats.refcoco import read_refcoco, recognise_refcoco
from cogvlm_ft.shards.formats.rows import read_head
from cogvlm_ft.shards.formats.swift import read_swift, recognise_swift
from cogvlm_ft.shards.formats.unread import describe_unread
from cogvlm_ft.shards.formats.voc import read_voc, recognise_voc
from cogvlm_ft.shards.formats.yolo import read_yolo, recognise_yolo
from cogvlm_ft.shards.packing.candidates import Candidate, Problem

_MAX_COUNTED = 1000
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_ANNOTATION_ENDINGS = (".txt", ".json", ".jsonl", ".xml", ".csv")


@dataclass(frozen=True)
class Format:
    """A way to write annotations.

    read: (annotations, images folder) -> candidates, and problems that belong to none of them.
        Raises DataError if the annotations are of another format.
    recognise: what was recognised, for people, or None for another format. Inspects names and the ends of files only.
    has_open_units: candidates may leave the unit of their boxes to be decided over the whole source.
    """

    read: Callable[[Path, Path], Iterator[Candidate | Problem]]
    recognise: Callable[[Path], str | None]
    has_open_units: bool = False


def _never(_: Path) -> None:
    """Recognise nothing: the user states such a format."""


FORMATS: dict[str, Format] = {
    "voc": Format(read_voc, recognise_voc),
    "cvat": Format(read_cvat, recognise_cvat),
    "label-studio": Format(read_label_studio, recognise_label_studio),
    "yolo": Format(read_yolo, recognise_yolo),
    "labelme": Format(read_labelme, recognise_labelme),
    "csv": Format(read_csv_boxes, recognise_csv_boxes, has_open_units=True),
    "refcoco": Format(read_refcoco, recognise_refcoco),
    "mdetr": Format(read_mdetr, recognise_mdetr, has_open_units=True),
    "odvg": Format(read_odvg, recognise_odvg, has_open_units=True),
    "cogvlm-sft": Format(read_cogvlm_sft, recognise_cogvlm_sft),
    "swift": Format(read_swift, recognise_swift, has_open_units=True),
    "coco": Format(read_coco, recognise_coco, has_open_units=True),
    SIZES: Format(partial(read_coco, layout=SIZES), _never, has_open_units=True),
    CORNERS: Format(partial(read_coco, layout=CORNERS), _never, has_open_units=True),
    "jsonl": Format(read_jsonl, recognise_jsonl, has_open_units=True),
}
"""Format readers by the value of --format."""


def check_kind(annotations: Path) -> None:
    """Raise DataError for a path that may never end, or block."""
    if annotations.exists() and not annotations.is_file() and not annotations.is_dir():
        found = "found a named pipe, device or socket; expected a regular file or a folder"
        raise DataError(f"--annotations {annotations}: {found}. Save its content to a file first")


def fitting_formats(annotations: Path) -> list[tuple[str, str]]:
    """Return (name, what was recognised) of every format that fits. Raises DataError if the path cannot be read."""
    try:
        check_kind(annotations)
        seen = {name: format.recognise(annotations) for name, format in FORMATS.items()}
        return [(name, what) for name, what in seen.items() if what is not None]
    except OSError as error:
        raise DataError(f"--annotations {annotations} cannot be read: {error.strerror}") from None


def recognise_format(annotations: Path) -> tuple[str, str]:
    """Return (name of the format, what was recognised). Raises DataError unless exactly one format fits."""
    fits = fitting_formats(annotations)
    if len(fits) == 1:
        return fits[0]
    if fits:
        refuse_several(annotations, fits)
    try:
        unread = describe_unread(annotations)
        if unread:
            raise DataError(f"--annotations {annotations}: found {unread}")
        found = _describe(annotations)
    except OSError as error:
        raise DataError(f"--annotations {annotations} cannot be read: {error.strerror}") from None
    problem, advice = "is of no known format", f"Choose --format {', '.join(FORMATS)}."
    if annotations.is_dir() and _has_photos_only(annotations):
        advice = "These are photos without labels. Name the file or folder of the labels: --annotations PATH."
    raise DataError(f"--annotations {annotations} {problem}: found {found}. {advice}")


def refuse_several(annotations: Path, fits: list[tuple[str, str]], why: str = "") -> NoReturn:
    """Raise DataError about a path that fits several formats. why: how their labels differ, if that is known."""
    found = "; ".join(f"{what} (--format {name})" for name, what in fits) + (f"; {why}" if why else "")
    advice = "Choose one with its --format, or name the folder or file of one of them."
    raise DataError(f"--annotations {annotations} fits several formats: found {found}. {advice}")


def _has_photos_only(folder: Path) -> bool:
    names = islice(files_below(folder, ""), _MAX_COUNTED)
    endings = {posixpath.splitext(name)[1].lower().removeprefix(".") for name in names}
    return bool(endings) and endings <= set(IMAGE_EXTENSIONS)


def _describe(annotations: Path) -> str:
    """Describe for people what the path contains."""
    if annotations.is_dir():
        names = list(islice(files_below(annotations, ""), _MAX_COUNTED))
        endings = Counter(posixpath.splitext(name)[1] or "no ending" for name in names)
        kinds = [f"{count} x {ending}" for ending, count in endings.most_common(5)] or ["no files"]
        folders = sum(path.is_dir() for path in annotations.iterdir())
        first = next((name for name in names if name.lower().endswith(_ANNOTATION_ENDINGS)), None)
        begins = f"; {first} begins with {_head(annotations / first)}" if first else ""
        return ", ".join([*kinds, f"{folders} folders"]) + begins
    if not annotations.is_file():
        return "no file or folder"
    if annotations.suffix.lower() == ".csv" and annotations.stat().st_size:
        return describe_missing(first_line(annotations))
    return f"{annotations.stat().st_size} bytes that begin with {_head(annotations)}"


def _head(path: Path) -> str:
    head = read_head(path, 40)
    return f"{head!r}{', which is UTF-16: convert it to UTF-8' * head.startswith(_UTF16)}"
