"""The result of reading an annotation file, before the images are opened."""

from __future__ import annotations

import posixpath
import re
import reprlib
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from cogvlm_ft.data.record import detect_language, is_finite_number
from cogvlm_ft.grounding.targets import Box, Target, Turn

Units = Literal["pixels", "unit", "thousandths"]
UnitBasis = Literal["stated", "documented", "unknown"]
WrittenAs = Literal["corners", "sizes", "centres"]

_ADDRESS = re.compile("[A-Za-z][A-Za-z0-9+.-]*://")
_MAX_SHOWN = 80
_SHOWN = reprlib.Repr()
_SHOWN.maxlevel = 4
_SHOWN.maxlist = _SHOWN.maxdict = 10
_SHOWN.maxstring = _SHOWN.maxlong = _SHOWN.maxother = _MAX_SHOWN


@dataclass(frozen=True)
class Problem:
    """A part that is skipped, with the reason; or a note about an automatic decision.

    level: what is lost: "sample", "target", "box" or "turn"; "note" if nothing is.
    reason: a short name to count by. detail: a message for people. source: the line or annotation.
    """

    level: str
    reason: str
    detail: str
    source: str

    @property
    def is_note(self) -> bool:
        """Return whether nothing is lost."""
        return self.level == "note"


@dataclass(frozen=True)
class Candidate:
    """One image with its targets and turns.

    image: path relative to the images folder, normalised, so that one image has one name.
    key: the user's name for the sample, or None.
    targets: boxes are four finite numbers, not yet compared with the image.
    stated_size_px: the image size stated by the annotation, if any.
    units: of the boxes: "pixels", "unit" (0..1 of width and height) or "thousandths"; converted to pixels once the
        image is open.
    unit_basis: "stated": `units` are certain; "documented": as the format says, though some tools write others;
        "unknown": tools disagree. packing/box_units.py decides about the last two.
    written_as: the form of the boxes in the file, if it is to be checked over the whole source: corners x0 y0 x1 y1,
        sizes x y width height, or centres: the centre and the size.
    embedded_in: an annotation file that contains the image, used if there is no image file.
    problems: parts already skipped, and notes.
    image_hint: what the message says about similar files if the image is not found.
    split: "train", "val" or "test" if the user's files state one.
    lists_all: False if classes of the source may be in the image without annotation, as in LVIS and OpenImages.
    """

    image: str
    key: str | None
    source: str
    targets: tuple[Target, ...] = ()
    turns: tuple[Turn, ...] = ()
    stated_size_px: tuple[int, int] | None = None
    units: Units = "pixels"
    unit_basis: UnitBasis = "stated"
    written_as: WrittenAs | None = None
    embedded_in: Path | None = None
    problems: tuple[Problem, ...] = ()
    image_hint: str = ""
    split: str | None = None
    lists_all: bool = True

    @property
    def is_background(self) -> bool:
        """Return whether nothing is annotated in the image, and nothing of it was skipped."""
        return not self.targets and not self.turns and all(problem.is_note for problem in self.problems)


class Rejected(Exception):
    """A part of an annotation cannot be used."""

    def __init__(self, level: str, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.level = level
        self.reason = reason
        self.detail = detail

    def problem(self, source: str) -> Problem:
        """Return it as a problem of this source."""
        return Problem(self.level, self.reason, self.detail, source)


def require(ok: bool, level: str, field: str, value: object, expected: str) -> None:
    """Raise Rejected (reason bad_field) unless `ok`."""
    if not ok:
        raise Rejected(level, "bad_field", f"{field} is {shown(value)}; expected {expected}")


def shown(value: object) -> str:
    """Return a short form for messages, without traversing a deep or long value."""
    return _SHOWN.repr(value)[:_MAX_SHOWN]


def check_text(value: Any, level: str) -> None:
    """Raise Rejected (reason not_utf8) if a string in this JSON value has bytes that are not valid UTF-8."""
    for text in _strings(value):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Rejected(level, "not_utf8", f"{text!r:.80} is not valid UTF-8. Convert the file to UTF-8.") from None


def _strings(value: Any) -> Iterator[str]:
    parts = [value]
    while parts:
        part = parts.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            parts += [*part.keys(), *part.values()]
        elif isinstance(part, list):
            parts += part


def image_path(value: Any, field: str) -> str:
    """Return the normalised path, also from Windows or of an address; raises Rejected if it is not a path."""
    require(isinstance(value, str) and bool(value.strip()), "sample", field, value, "the path of an image")
    path = value.replace("\\", "/")
    if _ADDRESS.match(path):
        with suppress(ValueError):
            path = unquote(urlsplit(path).path).lstrip("/") or path
    return posixpath.normpath(path)


def four_numbers(box: Any, meaning: str) -> Box:
    """Return the coordinates as floats; raises Rejected if they are not four finite numbers."""
    require(isinstance(box, list), "box", "the box", box, f"a list {meaning}")
    if len(box) != 4:
        raise Rejected("box", "wrong_number_of_coordinates", f"{shown(box)} has {len(box)} numbers; expected {meaning}")
    for number in box:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise Rejected("box", "not_numeric", f"{shown(number)} in {shown(box)} is not a number")
        if not is_finite_number(number):
            raise Rejected("box", "not_finite", f"{shown(number)} in {shown(box)} is not finite")
    a, b, c, d = (float(number) for number in box)
    return a, b, c, d


def number(text: str | None, field: str) -> float:
    """Parse a number; raises Rejected. `four_numbers` checks that it is finite."""
    try:
        return float(text or "")
    except ValueError:
        raise Rejected("box", "not_numeric", f"{field} is {shown(text)}; expected a number") from None


def box_in_pixels(box: Box, units: Units, image_size_px: tuple[int, int]) -> Box:
    """Convert the box of a candidate with these `units`."""
    if units == "pixels":
        return box
    whole = 1 if units == "unit" else 1000
    width, height = image_size_px
    x0, y0, x1, y1 = box
    return x0 * width / whole, y0 * height / whole, x1 * width / whole, y1 * height / whole


def make_target(
    phrase: Any, boxes: list[Box], *, num_boxes_found: int, language: str | None = None, description: str | None = None
) -> Target:
    """Return a target; raises Rejected if the phrase is empty, or if all its boxes were lost.

    Such a target must not be kept: without boxes it would claim that the thing is not in the picture.
    """
    require(isinstance(phrase, str), "target", "phrase", phrase, "a string")
    check_text(phrase, "target")
    phrase = phrase.strip()
    if not phrase:
        raise Rejected("target", "empty_phrase", "the phrase (or category name) is empty")
    if num_boxes_found and not boxes:
        raise Rejected("target", "no_boxes_left", f"{phrase!r} has no valid box left of {num_boxes_found}")
    return Target(phrase, language or detect_language(phrase), tuple(boxes), description)


def make_targets(boxes_of: dict[str, list[Box | None]], source: str, problems: list[Problem]) -> tuple[Target, ...]:
    """Return one target per label; unusable ones become problems. None is a box that was already lost.

    Labels that differ only in blanks or in their Unicode form are one label, which is noted.
    """
    merged: dict[str, list[Box | None]] = {}
    spellings: dict[str, list[str]] = {}
    for label, boxes in boxes_of.items():
        phrase = " ".join(unicodedata.normalize("NFC", label).split())
        merged.setdefault(phrase, []).extend(boxes)
        spellings.setdefault(phrase, []).append(label)
    targets = []
    for phrase, boxes in merged.items():
        if len(spellings[phrase]) > 1:
            detail = f"{' and '.join(map(shown, spellings[phrase]))} are one label with {len(boxes)} boxes"
            problems.append(Problem("note", "labels_joined", detail, source))
        try:
            targets.append(make_target(phrase, [box for box in boxes if box], num_boxes_found=len(boxes)))
        except Rejected as rejected:
            problems.append(rejected.problem(source))
    return tuple(targets)
