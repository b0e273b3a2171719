"""Read the JSON objects of a file, one per line or in one array, grouped by image."""

from __future__ import annotations

import json
import re
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Box, Target
from cogvlm_ft.plain_files import open_regular, read_file
from cogvlm_ft.shards.packing.candidates import Candidate, Problem, Rejected, check_text, require, shown

MAX_LINE_BYTES = 64 * 2**20
_HEAD_BYTES = 2**20
_BLANKS = re.compile(r"\s*")
_LAID_OUT = re.compile(rb"\{\s*\n\s*\"")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One object of a file with its position."""

    source: str
    value: dict[str, Any]


@dataclass(frozen=True)
class _Place:
    """The position of a row. position: byte of the line, or index in the array. content: bytes, else a value."""

    source: str
    position: int
    number: int
    content: Any

    def row(self) -> Row:
        """Parse the row; raises Rejected if it is not a JSON object."""
        if isinstance(self.content, bytes):
            return Row(self.source, parse_object(self.content))
        check_text(self.content, "sample")
        return Row(self.source, _object(self.content))


class _Rows:
    """The rows of an open file; `values` if it is one array."""

    def __init__(self, file: BinaryIO, name: str, values: list[Any] | None) -> None:
        self._file = file
        self._name = name
        self._values = values

    def __iter__(self) -> Iterator[_Place]:
        if self._values is not None:
            yield from (self.at(i, i) for i in range(len(self._values)))
            return
        position = number = 0
        while line := self._file.readline(MAX_LINE_BYTES):
            number += 1
            if line.strip():
                yield _Place(f"{self._name}:{number}", position, number, line)
            position += len(line)
            while len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):  # too long: not valid JSON either, skip it
                line = self._file.readline(MAX_LINE_BYTES)
                position += len(line)

    def at(self, position: int, number: int) -> _Place:
        """Read a row again at its position."""
        if self._values is not None:
            return _Place(f"{self._name}[{position}]", position, number, self._values[position])
        self._file.seek(position)
        return _Place(f"{self._name}:{number}", position, number, self._file.readline(MAX_LINE_BYTES))


def rows_by_image(
    path: Path, image_of: Callable[[dict[str, Any]], str | None], *, expected: str, arrays: bool
) -> Iterator[list[Row] | Problem]:
    """Yield every object of the file, grouped by image, in the order in which the images first appear.

    image_of: returns the image of an object, None if it must not be joined with others; may raise Rejected.
    arrays: also accept a file that is one JSON array. Raises DataError if no object can be used.
    Rows that may be joined are read twice, so that memory holds only 24 bytes per row.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder; expected a file: {expected}")
    hashes, positions, numbers = array("Q"), array("Q"), array("Q")
    num_bad, num_alone, first = 0, 0, ""
    with open_regular(path) as file:
        rows = _Rows(file, path.name, _load_array(path) if arrays else None)
        for place in rows:
            try:
                row = place.row()
                image = image_of(row.value)
            except Rejected as rejected:
                num_bad += 1
                first = first or f"; first: {rejected.detail}"
                yield rejected.problem(place.source)
                continue
            if image is None:
                num_alone += 1
                yield [row]
                continue
            hashes.append(int.from_bytes(blake2b(image.encode(), digest_size=8).digest(), "little"))
            positions.append(place.position)
            numbers.append(place.number)
        if not hashes and not num_alone:
            raise DataError(f"{path}: none of its {num_bad} lines can be used; expected {expected}{first}")
        for group in groups_of_equal(hashes):
            by_image: dict[str | None, list[Row]] = defaultdict(list)  # two images may share a hash
            for i in group:
                try:
                    row = rows.at(positions[i], numbers[i]).row()
                    by_image[image_of(row.value)].append(row)
                except Rejected as rejected:
                    raise DataError(f"{path} changed while it was read: {rejected.detail}") from None
            yield from by_image.values()


def merge_same_image(candidates: Sequence[Candidate]) -> Candidate:
    """Merge the rows of one image into a candidate; boxes that contradict the first ones become problems."""
    if len(candidates) == 1:
        return candidates[0]
    first = next((candidate for candidate in candidates if candidate.targets), candidates[0])
    size = first.stated_size_px
    targets: list[Target] = []
    problems: list[Problem] = []
    is_unknown = False
    for candidate in candidates:
        problems += candidate.problems
        other_size = size and candidate.stated_size_px and size != candidate.stated_size_px
        if candidate.targets and (other_size or not _have_one_unit(candidate, first)):
            found = f"boxes in {_unit(candidate)}, image size {candidate.stated_size_px}"
            detail = f"{found}; {first.source} has {_unit(first)} and {size} for the same image"
            problems += (
                Problem("target", "contradiction", f"{shown(target.phrase)}: {detail}", candidate.source)
                for target in candidate.targets
            )
        else:
            targets += candidate.targets
            is_unknown = is_unknown or (bool(candidate.targets) and candidate.unit_basis == "unknown")
        size = size or candidate.stated_size_px
    return replace(
        first,
        source=candidates[0].source,
        targets=tuple(targets),
        turns=tuple(turn for candidate in candidates for turn in candidate.turns),
        stated_size_px=size,
        unit_basis="unknown" if is_unknown else first.unit_basis,
        problems=tuple(problems),
    )


def _have_one_unit(one: Candidate, other: Candidate) -> bool:
    are_equally_certain = (one.unit_basis == "stated") == (other.unit_basis == "stated")
    return one.units == other.units and are_equally_certain


def _unit(candidate: Candidate) -> str:
    return candidate.units if candidate.unit_basis == "stated" else f"{candidate.units} (assumed)"


def load_json(path: Path, expected: str) -> Any:
    """Load a JSON file; raises DataError. Bytes that are not valid UTF-8 are kept for `check_text` to report."""
    try:
        return json.loads(read_file(path).removeprefix(_BOM).decode("utf-8", "surrogateescape"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; expected {expected}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}; expected {expected}") from None


def load_lists(path: Path, expected: str) -> dict[str, Any]:
    """Load a JSON file with the lists "images" and "annotations"; raises DataError."""
    content = load_json(path, expected)
    names = ("images", "annotations")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in names):
        found = ", ".join(sorted(content)[:10]) if isinstance(content, dict) else f"a {type(content).__name__}"
        detail = f'has no lists "images" and "annotations"; found {found or "nothing"}'
        raise DataError(f"{path} {detail}; expected {expected}")
    return content


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse one JSON object; raises Rejected if it is something else, too long, or not UTF-8."""
    if len(data) >= MAX_LINE_BYTES:
        raise Rejected("sample", "too_long", f"{MAX_LINE_BYTES} bytes or more: {data[:80]!r}")
    try:
        text = data.removeprefix(_BOM).decode("utf-8", "surrogateescape")
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Rejected("sample", "bad_json", f"{error}: {data[:80]!r}") from None
    if not text.isascii() or "\\u" in text:  # else it has neither invalid UTF-8 nor half a surrogate pair
        check_text(value, "sample")
    return _object(value)


def first_objects(path: Path) -> list[dict[str, Any]]:
    """Return some of the first JSON objects of a file of lines or of one array, as far as its head shows them."""
    head = read_head(path, _HEAD_BYTES)
    if head[:1] == b"[":
        texts = [head[1:].decode("utf-8", "ignore").lstrip()]
    elif _is_laid_out(head):
        texts = [head.decode("utf-8", "ignore")]
    else:
        texts = [line.decode("utf-8", "ignore") for line in head.splitlines()[:20]]
    values = (_first_value(text) for text in texts)
    return [value for value in values if isinstance(value, dict)]


def read_head(path: Path, num_bytes: int) -> bytes:
    """Return the first bytes of a file without byte order mark and blanks; empty for a folder."""
    if not path.is_file():
        return b""
    with open_regular(path) as file:
        return file.read(num_bytes).removeprefix(_BOM).lstrip()


def stated_size(value: dict[str, Any]) -> tuple[int, int] | None:
    """Return (width, height) if the annotation states them, also as 50.0 or as text."""
    width, height = whole_number(value.get("width")), whole_number(value.get("height"))
    return (width, height) if width and height else None


def whole_number(value: Any) -> int | None:
    """Return a positive whole number, also one written as 50.0 or as text; None for anything else."""
    try:
        found = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else 0.0
    except (ValueError, OverflowError):
        return None
    return int(found) if found > 0 and found.is_integer() else None


def are_fractions(boxes: Iterable[Box], largest: float = 1.02) -> bool:
    """Return whether the boxes could only be fractions of an image: none reaches beyond `largest`, not all are whole.

    Boxes of fractions may reach a little beyond the image.
    """
    has_fraction = False
    for box in boxes:
        if max(map(abs, box)) > largest:
            return False
        has_fraction = has_fraction or not all(side.is_integer() for side in box)
    return has_fraction


def _load_array(path: Path) -> list[Any] | None:
    """Load the file as one array; return None if it is not one, to read it line by line.

    Raises DataError for an array that is not valid JSON: line by line, only a few of its objects would be found.
    """
    head = read_head(path, MAX_LINE_BYTES)
    if _is_laid_out(head):
        return _load_objects(path)
    if head[:1] != b"[":
        return None
    try:
        values = load_json(path, "one JSON array, or one JSON object per line")
    except DataError:
        if _begins_array(head.split(b"\n", 1)[0].strip()):
            raise
        return None
    return values if isinstance(values, list) else None


def _is_laid_out(head: bytes) -> bool:
    """Return whether the file begins with an object over several lines, as programs indent it."""
    return _LAID_OUT.match(head) is not None


def _load_objects(path: Path) -> list[Any]:
    """Load the objects of a file, one after the other. Raises DataError if one is not valid JSON."""
    text = read_file(path).removeprefix(_BOM).decode("utf-8", "surrogateescape").strip()
    values, position = [], 0
    try:
        while position < len(text):
            value, position = json.JSONDecoder().raw_decode(text, position)
            values.append(value)
            position = _BLANKS.match(text, position).end()  # type: ignore[union-attr]  # it fits anything
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}; expected JSON objects, best one per line") from None
    return values


def _begins_array(line: bytes) -> bool:
    """Return whether this first line is a bracket, with or without a whole object and a comma after it."""
    value = _first_value(line[1:].decode("utf-8", "ignore").strip())
    return line == b"[" or (isinstance(value, dict) and line.endswith(b","))


def groups_of_equal(hashes: array[int]) -> Iterator[list[int]]:
    """Group the indices of equal numbers; groups are ordered by their first index."""
    if not hashes:
        return
    order = np.argsort(np.frombuffer(hashes, dtype=np.uint64), kind="stable")
    values = np.frombuffer(hashes, dtype=np.uint64)[order]
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    ends = np.r_[starts[1:], len(order)]
    for group in np.argsort(order[starts], kind="stable"):
        yield order[starts[group] : ends[group]].tolist()


def _object(value: Any) -> dict[str, Any]:
    require(isinstance(value, dict), "sample", "the JSON", value, "an object")
    return value


def _first_value(text: str) -> Any:
    try:
        return json.JSONDecoder().raw_decode(text)[0]
    except (ValueError, RecursionError):
        return None
