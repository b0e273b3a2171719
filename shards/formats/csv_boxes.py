"""CSV with a line of column names, then one box per line.

image,left,top,right,bottom,question
a.jpg,1,2,30,20,Where is the dog?
https://example.org/photos/b.jpg,5,5,9,9,"Which one is red, and round?"

Optional columns: width and height (of the image), language (zh or en). Letter case and order are ignored; other column
names are in `csv_columns`, also x, y, w, h, and the files of RetinaNet, MakeSense and Vertex AI without column names.
The last part of a URL is the file name. Lines of one image become one sample, in any order; lines with the same phrase
become one target with several boxes. Separated by comma, semicolon or tab; in UTF-8, GBK or UTF-16.
"""

from __future__ import annotations

import csv
import posixpath
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.formats.csv_columns import CORNERS, EXPECTED, Layout, describe_missing, layout_of
from cogvlm_ft.shards.formats.csv_text import MAX_LINE_BYTES, class_names, first_line, open_utf8
from cogvlm_ft.shards.formats.csv_vertex import vertex_cells
from cogvlm_ft.shards.formats.folders import files_below
from cogvlm_ft.shards.formats.listed_photos import ListedPhotos, read_files
from cogvlm_ft.shards.formats.rows import groups_of_equal
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
    shown,
)
from cogvlm_ft.shards.packing.given_splits import split_of_folder

_FILE_IN_FOLDER = "_annotations.csv"


@dataclass(frozen=True)
class _Row:
    """A line, or several if a quoted text contains line breaks. cells: empty if unreadable, see `defect`."""

    source: str
    cells: list[str]
    defect: Rejected | None
    next_position: int
    next_number: int


def read_csv_boxes(annotations: Path, images: Path) -> Iterator[Candidate | Problem]:
    """Yield one candidate per image with one target per phrase. Raises DataError if the columns are not known.

    Lines are read twice, so that memory holds only a few numbers per line.
    """
    if not annotations.is_dir():
        yield from _read_file(annotations, ListedPhotos(images, ""))
        return
    names = _files_of(annotations)
    if not names:
        raise DataError(f"{annotations}: no {_FILE_IN_FOLDER} in it or in its folders; expected one, or name the file")
    yield from read_files(
        (name, _read_file(annotations / name, ListedPhotos(images, posixpath.dirname(name)))) for name in names
    )


def recognise_csv_boxes(annotations: Path) -> str | None:
    """Recognise the columns by the first line; of a folder only Roboflow's files."""
    if annotations.is_dir():
        names = _files_of(annotations)
        return f"CSV files: {', '.join(names[:3])}" if names else None
    layout = layout_of(first_line(annotations))
    return f"a CSV file with columns for {', '.join(layout.columns)}" if layout else None


def _files_of(folder: Path) -> list[str]:
    found = (name for name in files_below(folder, ".csv") if posixpath.basename(name) == _FILE_IN_FOLDER)
    return [name for name in found if layout_of(first_line(folder / name))]


def _read_file(path: Path, photos: ListedPhotos) -> Iterator[Candidate | Problem]:
    if not path.is_file():
        raise DataError(f"{path} is not a file; expected a CSV file")
    line = first_line(path)
    layout = layout_of(line)
    if layout is None:
        raise DataError(f"{path}: {describe_missing(line)}; expected {EXPECTED}")
    source = _Source(path.name, layout, photos, class_names(path.parent) if layout.has_codes else {})
    with ExitStack() as stack:
        file, notes = open_utf8(path, stack)
        yield from notes
        yield from _candidates(file, source)


@dataclass(frozen=True)
class _Source:
    """The known facts about a file. names: phrases by code, for codes only."""

    name: str
    layout: Layout
    photos: ListedPhotos
    names: dict[str, str]


def _candidates(file: BinaryIO, source: _Source) -> Iterator[Candidate | Problem]:
    hashes, positions, numbers = array("Q"), array("Q"), array("Q")
    layout = source.layout
    if layout.has_head:
        file.readline(MAX_LINE_BYTES)
    position, number_of_line = file.tell(), 1 + layout.has_head
    while row := _read_row(file, source.name, position, number_of_line, layout):
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
            row = _read_row(file, source.name, positions[i], numbers[i], layout)
            assert row is not None
            by_image.setdefault(_image(row, layout), []).append(row)
        for image, rows in by_image.items():
            assert image is not None
            try:
                yield _candidate(image, rows, source)
            except Rejected as rejected:
                yield rejected.problem(rows[0].source)


def _read_row(file: BinaryIO, name: str, position: int, line_number: int, layout: Layout) -> _Row | None:
    """Read the row that begins at this byte; return None at the end of the file.

    After a row that cannot be read, the next one begins at the next line: a quote that is never closed costs one line.
    """
    file.seek(position)
    ends: list[int] = []

    def lines() -> Iterator[str]:
        while line := file.readline(MAX_LINE_BYTES):
            ends.append(file.tell())
            yield line.decode("utf-8", "surrogateescape")

    source = f"{name}:{line_number}"
    try:
        cells = next(csv.reader(lines(), delimiter=layout.delimiter, strict=True), None)
    except csv.Error as error:
        return _Row(source, [], Rejected("target", "bad_line", str(error)), ends[0], line_number + 1)
    if cells is None:
        return None
    row = _Row(source, cells, None, ends[-1], line_number + len(ends))
    return _in_our_columns(row) if layout.is_vertex and any(cells) else row


def _in_our_columns(row: _Row) -> _Row:
    """Return the row with the cells of Vertex AI in the order of our columns."""
    try:
        return replace(row, cells=vertex_cells(row.cells))
    except Rejected as rejected:
        return replace(row, cells=[], defect=rejected)


def _image(row: _Row, layout: Layout) -> str | None:
    """Return the image path, or None for an empty line."""
    if row.defect:
        raise row.defect
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


def _candidate(image: str, rows: list[_Row], source: _Source) -> Candidate:
    layout = source.layout
    problems: list[Problem] = []
    boxes_of: dict[str, list[Box | None]] = {}  # None: an unusable box
    languages: dict[str, str] = {}
    size: tuple[int, int] | None = None
    splits = {split_of_folder(layout.cell(row.cells, "split")) for row in rows} - {None}
    for row in rows:
        if not layout.has_head and not any(layout.cell(row.cells, name) for name in ("question", *CORNERS)):
            continue  # an image without objects
        try:
            phrase, language = _words(row.cells, source)
            stated = _size(row.cells, layout)
            if size and stated and stated != size:
                raise Rejected("target", "contradiction", f"the image has {stated} pixels here, {size} above")
            size = size or stated
            if language:
                languages.setdefault(phrase, language)
            if layout.cell(row.cells, "crowd") == "1":
                raise Rejected("box", "crowd", f"{phrase!r}: IsGroupOf, not a single object")
            boxes = boxes_of.setdefault(phrase, [])
            boxes.append(None)
            boxes[-1] = _box(row.cells, layout)
        except Rejected as rejected:
            problems.append(rejected.problem(row.source))
    targets = make_targets(boxes_of, rows[0].source, problems)
    names = (image, f"{image}.jpg") if layout.has_codes else (image,)
    return Candidate(
        image=source.photos.find(*names),
        key=None,
        source=rows[0].source,
        targets=tuple(replace(target, language=languages.get(target.phrase, target.language)) for target in targets),
        stated_size_px=size,
        units="unit" if layout.has_fractions else "pixels",
        unit_basis="stated" if layout.has_fractions else "documented",
        written_as="sizes" if layout.has_sizes else "corners",
        problems=tuple(problems),
        split=splits.pop() if len(splits) == 1 else None,
        lists_all=not layout.has_codes,
    )


def _box(cells: list[str], layout: Layout) -> Box:
    texts = [layout.cell(cells, name) for name in CORNERS]
    if layout.delimiter != ",":
        texts = [text.replace(",", ".") for text in texts]  # decimal commas
    numbers = [number(text, name) for name, text in zip(CORNERS, texts, strict=True)]
    meaning = "x, y, width, height" if layout.has_sizes else "left, top, right, bottom"
    x, y, right, bottom = four_numbers(numbers, meaning)
    return (x, y, x + right, y + bottom) if layout.has_sizes else (x, y, right, bottom)


def _words(cells: list[str], source: _Source) -> tuple[str, str]:
    """Return (phrase, language or None). Line breaks and repeated blanks become one blank."""
    phrase = " ".join(source.layout.phrase(cells).split())
    if not phrase:
        raise Rejected("target", "empty_phrase", "the phrase is empty")
    if source.layout.has_codes:
        if phrase not in source.names:
            raise Rejected("target", "unknown_code", f"{shown(phrase)} is not in the file of class descriptions")
        phrase = " ".join(source.names[phrase].split())
    language = source.layout.cell(cells, "language").lower()
    require(language in ("", "zh", "en"), "target", "the language", language, "zh, en or nothing")
    return phrase, language


def _size(cells: list[str], layout: Layout) -> tuple[int, int] | None:
    try:
        width, height = (int(float(layout.cell(cells, name))) for name in ("width", "height"))
    except (ValueError, OverflowError):
        return None
    return (width, height) if width > 0 and height > 0 else None
