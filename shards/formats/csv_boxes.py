"""CSV with a line of column names, then one box per line.

image,left,top,right,bottom,question
a.jpg,1,2,30,20,Where is the dog?
https://example.org/photos/b.jpg,5,5,9,9,"Which one is red, and round?"

Optional columns: width and height (of the image), language (zh or en). Letter case and order are ignored; other column
names are listed below. The last part of a URL is the file name. Lines of one image become one sample, in any order;
lines with the same phrase become one target with several boxes. Separated by comma, semicolon or tab; in UTF-8.
"""

from __future__ import annotations

import csv
import posixpath
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.formats.rows import groups_of_equal, read_head
from cogvlm_ft.shards.packing.candidates import (
    Candidate,
    Problem,
    Rejected,
    check_text,
    four_numbers,
    image_path,
    make_targets,
    number,
    require,
)

_CORNERS = (
    ("left", "top", "right", "bottom"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("x0", "y0", "x1", "y1"),
    ("x1", "y1", "x2", "y2"),
)
_IMAGE = ("image", "filename", "file_name", "image_path", "image_name", "file", "path", "url", "image_url")
_PHRASE = ("question", "phrase", "caption", "expression", "class", "label", "category", "name")
_OPTIONAL = ("width", "height", "language")
_DELIMITERS = ",;\t"
_MAX_LINE_BYTES = 2**20
_HEAD_BYTES = 2**16


@dataclass(frozen=True)
class _Layout:
    """The positions of the columns. columns: numbers from 0 by our names; num_columns: of every line."""

    columns: dict[str, int]
    num_columns: int
    delimiter: str

    def cell(self, cells: list[str], name: str) -> str:
        """Return the text of a column, empty if the column does not exist."""
        return cells[self.columns[name]].strip() if name in self.columns else ""


@dataclass(frozen=True)
class _Row:
    """A line, or several if a quoted text contains line breaks. cells: empty if unreadable, see `defect`."""

    source: str
    cells: list[str]
    defect: str | None
    next_position: int
    next_number: int


def read_csv_boxes(annotations: Path, images: Path) -> Iterator[Candidate | Problem]:
    """Yield one candidate per image with one target per phrase. Raises DataError without a header line.

    Lines are read twice, so that memory holds only a few numbers per line.
    """
    if not annotations.is_file():
        raise DataError(f"{annotations} is not a file; expected a CSV file")
    hashes, positions, numbers = array("Q"), array("Q"), array("Q")
    with annotations.open("rb") as file:
        layout = _layout_of(file.readline(_MAX_LINE_BYTES))
        if layout is None:
            expected = "image,left,top,right,bottom,question or other names of them (see docs/formats.md)"
            raise DataError(f"{annotations}: the first line is {read_head(annotations, 80)!r}; expected {expected}")
        position, number_of_line = file.tell(), 2
        while row := _read_row(file, annotations.name, position, number_of_line, layout):
            try:
                image = _image(row, layout)
                if image:
                    hashes.append(int.from_bytes(blake2b(image.encode(), digest_size=8).digest(), "little"))
                    positions.append(position)
                    numbers.append(number_of_line)
            except Rejected as rejected:
                yield rejected.problem(row.source)
            position, number_of_line = row.next_position, row.next_number
        for group in groups_of_equal(hashes):
            by_image: dict[str | None, list[_Row]] = {}  # two images may share a hash
            for i in group:
                row = _read_row(file, annotations.name, positions[i], numbers[i], layout)
                assert row is not None
                by_image.setdefault(_image(row, layout), []).append(row)
            for image, rows in by_image.items():
                assert image is not None
                yield _candidate(image, rows, layout)


def recognise_csv_boxes(annotations: Path) -> str | None:
    """Recognise the column names in the first line."""
    layout = _layout_of(read_head(annotations, _HEAD_BYTES).split(b"\n")[0])
    return f"a CSV file with columns for {', '.join(layout.columns)}" if layout else None


def _layout_of(line: bytes) -> _Layout | None:
    """Return the layout of the header, or None if a column is missing."""
    for delimiter in _DELIMITERS:
        try:
            cells = next(csv.reader([line.decode("utf-8-sig", "surrogateescape")], delimiter=delimiter), [])
        except csv.Error:
            continue
        names = [cell.strip().lower() for cell in cells]
        image = next((name for name in _IMAGE if name in names), None)
        phrase = next((name for name in _PHRASE if name in names), None)
        corners = next((corners for corners in _CORNERS if set(corners) <= set(names)), None)
        if image and phrase and corners:
            found = {"image": image, **dict(zip(_CORNERS[0], corners, strict=True)), "question": phrase}
            found |= {name: name for name in _OPTIONAL if name in names}
            return _Layout({ours: names.index(name) for ours, name in found.items()}, len(names), delimiter)
    return None


def _read_row(file: BinaryIO, name: str, position: int, line_number: int, layout: _Layout) -> _Row | None:
    """Read the row that begins at this byte; return None at the end of the file.

    After a row that cannot be read, the next one begins at the next line: a quote that is never closed costs one line.
    """
    file.seek(position)
    ends: list[int] = []

    def lines() -> Iterator[str]:
        while line := file.readline(_MAX_LINE_BYTES):
            ends.append(file.tell())
            yield line.decode("utf-8", "surrogateescape")

    source = f"{name}:{line_number}"
    try:
        cells = next(csv.reader(lines(), delimiter=layout.delimiter, strict=True), None)
    except csv.Error as error:
        return _Row(source, [], str(error), ends[0], line_number + 1)
    return None if cells is None else _Row(source, cells, None, ends[-1], line_number + len(ends))


def _image(row: _Row, layout: _Layout) -> str | None:
    """Return the image path, or None for an empty line."""
    if row.defect:
        raise Rejected("target", "bad_line", row.defect)
    if not any(cell.strip() for cell in row.cells):
        return None
    check_text(row.cells, "target")
    if len(row.cells) != layout.num_columns:
        detail = f"{len(row.cells)} columns; expected {layout.num_columns}. Quote texts with {layout.delimiter!r}"
        raise Rejected("target", "wrong_number_of_columns", detail)
    image = layout.cell(row.cells, "image")
    if "://" in image:
        try:
            image = posixpath.basename(unquote(urlsplit(image).path))
        except ValueError as error:
            raise Rejected("target", "bad_field", f"the URL of the image is {image!r:.80}: {error}") from None
    return image_path(image, "the image")


def _candidate(image: str, rows: list[_Row], layout: _Layout) -> Candidate:
    problems: list[Problem] = []
    boxes_of: dict[str, list[Box | None]] = {}  # None: an unusable box
    languages: dict[str, str] = {}
    size: tuple[int, int] | None = None
    for row in rows:
        try:
            phrase, language = _words(row.cells, layout)
            stated = _size(row.cells, layout)
            if size and stated and stated != size:
                raise Rejected("target", "contradiction", f"the image has {stated} pixels here, {size} above")
            size = size or stated
            if language:
                languages.setdefault(phrase, language)
            boxes = boxes_of.setdefault(phrase, [])
            boxes.append(None)
            corners = [number(layout.cell(row.cells, name), name) for name in _CORNERS[0]]
            boxes[-1] = four_numbers(corners, "left, top, right, bottom")
        except Rejected as rejected:
            problems.append(rejected.problem(row.source))
    targets = make_targets(boxes_of, rows[0].source, problems)
    return Candidate(
        image=image,
        key=None,
        source=rows[0].source,
        targets=tuple(replace(target, language=languages.get(target.phrase, target.language)) for target in targets),
        stated_size_px=size,
        unit_basis="documented",
        problems=tuple(problems),
    )


def _words(cells: list[str], layout: _Layout) -> tuple[str, str]:
    """Return (phrase, language or None). Line breaks and repeated blanks become one blank."""
    phrase = " ".join(layout.cell(cells, "question").split())
    if not phrase:
        raise Rejected("target", "empty_phrase", "the phrase is empty")
    language = layout.cell(cells, "language").lower()
    require(language in ("", "zh", "en"), "target", "the language", language, "zh, en or nothing")
    return phrase, language


def _size(cells: list[str], layout: _Layout) -> tuple[int, int] | None:
    try:
        width, height = (int(float(layout.cell(cells, name))) for name in ("width", "height"))
    except (ValueError, OverflowError):
        return None
    return (width, height) if width > 0 and height > 0 else None
