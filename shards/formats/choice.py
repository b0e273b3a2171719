"""Choose what to read of a folder that holds labels in several formats, or one file with all of them.

Several label sets of the same photos are mostly conversions of one: then the fullest is read, and the line says so.
Otherwise the user chooses, at a terminal or with --format.
"""

from __future__ import annotations

import posixpath
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.formats import FORMATS, fitting_formats, recognise_format, refuse_several
from cogvlm_ft.shards.formats.folders import files_below
from cogvlm_ft.shards.packing.candidates import Candidate
from cogvlm_ft.shards.packing.photo_headers import PhotoHeaders
from cogvlm_ft.shards.packing.photo_names import with_photos
from cogvlm_ft.terminal import counted, plain_line, say

_TOLERANCE = 0.01  # of a side: tools round to pixels, and count from 0 or 1
_WHOLE = {"unit": 1.0, "thousandths": 1000.0}
_LISTS = (".csv", ".jsonl", ".json")
_MAX_INSPECTED, _MAX_NAMED = 50, 3


class Source(NamedTuple):
    """What is read: the name of the format, the file or folder, and a line about the choice for people."""

    format: str
    annotations: Path
    seen: str


@dataclass
class _Labels:
    """What a format reads there: by photo, the boxes of each phrase as fractions. failure: why it cannot be read."""

    name: str
    seen: str
    photos: dict[str, dict[str, list[Box]]] = field(default_factory=dict)
    failure: str = ""

    @property
    def num_boxes(self) -> int:
        return sum(len(boxes) for phrases in self.photos.values() for boxes in phrases.values())

    @property
    def counted(self) -> str:
        return f"{counted(self.num_boxes, 'box')} in {counted(len(self.photos), 'photo')}"


def settle_source(name: str, annotations: Path, images: Path) -> tuple[str, Path]:
    """Return the format and what to read. For the format `auto` both are chosen, and printed. Raises DataError."""
    if name != "auto":
        return name, annotations
    source = choose_source(annotations, images)
    say(f"{annotations}: reading --format {source.format}: {plain_line(source.seen)}", flush=True)
    return source.format, source.annotations


def choose_source(annotations: Path, images: Path) -> Source:
    """Return what to read. Raises DataError if that is not certain and nobody can be asked."""
    fits = fitting_formats(annotations)
    if len(fits) > 1 and annotations.is_dir() and images.is_dir():
        say(f"{annotations}: found several formats: {', '.join(dict(fits))}; comparing their boxes", flush=True)
        all_labels = [_read(name, seen, annotations, images) for name, seen in fits]
        return _without_doubt(all_labels, annotations) or _asked(all_labels, annotations)
    if not fits and annotations.is_dir():
        files = _lists_in(annotations)
        if len(files) == 1:
            return files[0]
        if files:
            found = ", ".join(str(source.annotations) for source in files[:_MAX_NAMED])
            found += ", ..." if len(files) > _MAX_NAMED else ""
            raise DataError(
                f"--annotations {annotations}: found {len(files)} files with labels: {found}; expected one. Name it: "
                f"--annotations {files[0].annotations} --images {images}"
            )
    name, seen = recognise_format(annotations)
    return Source(name, annotations, seen)


def _lists_in(folder: Path) -> list[Source]:
    """Return the files below a folder that hold labels of many photos each."""
    names = (name for name in files_below(folder, "") if name.lower().endswith(_LISTS))
    sources = []
    for name in islice(names, _MAX_INSPECTED):
        fits = fitting_formats(folder / name)
        if len(fits) == 1:
            sources.append(Source(fits[0][0], folder / name, f"{name}: {fits[0][1]}"))
    return sources


def _read(name: str, seen: str, annotations: Path, images: Path) -> _Labels:
    """Read the boxes of all photos that exist. Photos go by their names alone: a conversion copies them."""
    labels, headers = _Labels(name, seen), PhotoHeaders(images)
    try:
        for part in with_photos(FORMATS[name].read(annotations, images), images):
            if isinstance(part, Candidate) and part.targets and (images / part.image).is_file():
                phrases = labels.photos.setdefault(posixpath.basename(part.image), {})
                for phrase, box in _fractions(part, headers):
                    phrases.setdefault(phrase, []).append(box)
    except DataError as error:
        labels.failure = str(error).partition(";")[0]
    return labels


def _fractions(candidate: Candidate, headers: PhotoHeaders) -> Iterator[tuple[str, Box]]:
    whole = _WHOLE.get(candidate.units)
    if whole:
        x, y = whole, whole
    else:
        header = None if candidate.stated_size_px else headers.read(candidate)
        x, y = candidate.stated_size_px or (header and header.size_px) or (1, 1)
    for target in candidate.targets:
        for x0, y0, x1, y1 in target.boxes_xyxy:
            yield target.phrase.casefold(), (x0 / x, y0 / y, x1 / x, y1 / y)


def _without_doubt(all_labels: list[_Labels], annotations: Path) -> Source | None:
    """Return the fullest labels if all others that can be read say the same; None if they do not."""
    readable = [labels for labels in all_labels if labels.photos and not labels.failure]
    if not readable:
        return None
    best = max(readable, key=lambda labels: (len(labels.photos), labels.num_boxes))
    others = [labels for labels in all_labels if labels is not best]
    if any(_difference(labels, best) for labels in others if labels.photos and not labels.failure):
        return None
    reasons = [_why_not(labels, best) for labels in others]
    return Source(best.name, annotations, f"{best.seen}, {best.counted}; {'; '.join(reasons)}")


def _why_not(labels: _Labels, best: _Labels) -> str:
    option = f"--format {labels.name}"
    if labels.failure:
        return f"{option} fits too, but cannot be read: {labels.failure}"
    if not labels.photos:
        return f"{option} fits too, but has no box of these photos"
    if labels.counted == best.counted:
        return f"{option} has the same boxes"
    return f"{option} has {labels.counted}, the same ones"


def _difference(labels: _Labels, best: _Labels) -> str:
    """Return in which photo other boxes or phrases are found than in `best`; nothing if all are there too."""
    for photo, phrases in labels.photos.items():
        known = best.photos.get(photo)
        if known is None:
            return f"{photo} is labelled as {labels.name} only"
        if phrases.keys() != known.keys() or not all(_same(phrases[name], known[name]) for name in phrases):
            return f"the boxes of {photo} differ"
    return ""


def _same(some: list[Box], others: list[Box]) -> bool:
    """Check that each box has one in the other list, within the tolerance."""
    left = list(others)
    for box in some:
        fits = (other for other in left if all(abs(a - b) <= _TOLERANCE for a, b in zip(box, other, strict=True)))
        match = next(fits, None)
        if match is None:
            return False
        left.remove(match)
    return not left


def _asked(all_labels: list[_Labels], annotations: Path) -> Source:
    """Let the user choose at a terminal. Raises DataError without one, or without an answer."""
    fits = [(labels.name, f"{labels.seen}, {labels.failure or labels.counted}") for labels in all_labels]
    best = max(all_labels, key=lambda labels: len(labels.photos))
    differences = [_difference(labels, best) for labels in all_labels if labels is not best]
    why = next(filter(None, differences), "")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        refuse_several(annotations, fits, why)
    say(f"{annotations} holds labels in several formats{f', and {plain_line(why)}' if why else ''}:")
    for number, (name, seen) in enumerate(fits, start=1):
        say(f"  {number}  {name}: {plain_line(seen)}")
    while True:
        try:
            text = input("Which one should be read? Number or name: ").strip().lower()
        except EOFError:
            refuse_several(annotations, fits, why)
        for number, (name, seen) in enumerate(fits, start=1):
            if text in (str(number), name):
                return Source(name, annotations, seen)
