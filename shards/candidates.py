"""What a format reader finds in an annotation file, before the images are looked at."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cogvlm_ft.data.record import detect_language, is_finite_number
from cogvlm_ft.grounding.targets import Box, Target, Turn


@dataclass(frozen=True)
class Problem:
    """Something that is left out, and why.

    level: what is lost: "sample", "target", "box" or "turn".
    reason: a short word to count by; `detail` is for people.
    source: the line or annotation.
    """

    level: str
    reason: str
    detail: str
    source: str


@dataclass(frozen=True)
class Candidate:
    """One image with what is asked about it.

    image: path relative to the images folder, normalised, so that one image has one name.
    key: the user's own name for the sample, or None.
    targets: boxes are four finite numbers; whether they fit the image is not known yet.
    stated_size_px: the image size the annotation was made for, if it says so.
    units: of the boxes: "pixels", "unit" (0..1 of width and height) or "thousandths"; all become pixels once the image
        is open.
    embedded_in: an annotation file that carries the image itself, used when there is no image file.
    problems: parts already lost.
    """

    image: str
    key: str | None
    source: str
    targets: tuple[Target, ...] = ()
    turns: tuple[Turn, ...] = ()
    stated_size_px: tuple[int, int] | None = None
    units: Literal["pixels", "unit", "thousandths"] = "pixels"
    embedded_in: Path | None = None
    problems: tuple[Problem, ...] = ()


class Rejected(Exception):
    """A part of an annotation cannot be used."""

    def __init__(self, level: str, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.level = level
        self.reason = reason
        self.detail = detail

    def problem(self, source: str) -> Problem:
        """The same, with the place it was found."""
        return Problem(self.level, self.reason, self.detail, source)


def want(ok: bool, level: str, field: str, value: object, wanted: str) -> None:
    """Raises Rejected (reason bad_field) unless `ok`."""
    if not ok:
        raise Rejected(level, "bad_field", f"{field} is {value!r:.80}, wanted {wanted}")


def check_text(value: Any, level: str) -> None:
    """Raises Rejected (reason not_utf8) if a string anywhere in this JSON value carries bytes that are no UTF-8."""
    for text in _strings(value):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Rejected(level, "not_utf8", f"{text!r:.80} is not UTF-8; convert the file") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield name
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def image_path(value: Any, field: str) -> str:
    """The normalised path; raises Rejected if it is none."""
    want(isinstance(value, str) and bool(value.strip()), "sample", field, value, "the path of an image")
    return posixpath.normpath(value)


def four_numbers(box: Any, meaning: str) -> Box:
    """The coordinates as floats; raises Rejected if they are not four finite numbers."""
    want(isinstance(box, list), "box", "the box", box, f"a list {meaning}")
    if len(box) != 4:
        raise Rejected("box", "wrong_number_of_coordinates", f"{box!r:.80} has {len(box)}, wanted {meaning}")
    for number in box:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise Rejected("box", "not_numeric", f"{number!r:.80} in {box!r:.80} is no number")
        if not is_finite_number(number):
            raise Rejected("box", "not_finite", f"{number!r:.80} in {box!r:.80} is not finite")
    a, b, c, d = (float(number) for number in box)
    return a, b, c, d


def make_target(
    phrase: Any, boxes: list[Box], *, num_boxes_found: int, language: str | None = None, description: str | None = None
) -> Target:
    """A target; raises Rejected if the phrase is empty, or if it had boxes and lost them all.

    Such a target must not be kept: without boxes it would claim that the thing is not in the picture.
    """
    want(isinstance(phrase, str), "target", "phrase", phrase, "a string")
    check_text(phrase, "target")
    phrase = phrase.strip()
    if not phrase:
        raise Rejected("target", "empty_phrase", "the phrase (or category name) is empty")
    if num_boxes_found and not boxes:
        raise Rejected("target", "no_boxes_left", f"{phrase!r} lost all its boxes ({num_boxes_found})")
    return Target(phrase, language or detect_language(phrase), tuple(boxes), description)
