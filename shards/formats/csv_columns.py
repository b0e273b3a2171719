"""Recognise the columns of a CSV file: by the names in its first line, or by its content if it has none."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass

from cogvlm_ft.data.tars import IMAGE_EXTENSIONS
from cogvlm_ft.shards.formats.csv_vertex import COLUMNS, is_vertex

CORNERS = ("left", "top", "right", "bottom")
_CORNER_NAMES = (
    CORNERS,
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("x0", "y0", "x1", "y1"),
    ("x1", "y1", "x2", "y2"),
)
_SIZE_NAMES = (
    ("bbox_x", "bbox_y", "bbox_width", "bbox_height"),
    ("x", "y", "w", "h"),
    ("x", "y", "width", "height"),
)
_IMAGE = ("image", "filename", "file_name", "image_path", "image_name", "file", "path", "url", "image_url", "imageid")
_CLASS = ("class", "label", "category", "name", "label_name", "class_name", "category_name")
_PHRASE = ("question", "phrase", "caption", "expression", *_CLASS)
_PHRASES_OF_CODES = ("labelname",)
_OPTIONAL = (
    ("width", ("width", "image_width", "img_width")),
    ("height", ("height", "image_height", "img_height")),
    ("language", ("language",)),
    ("crowd", ("isgroupof",)),
    ("split", ("split", "set", "subset")),
)
_DELIMITERS = ",;\t"
_NUMBER = re.compile(r"\s*-?[0-9]+(\.[0-9]+)?\s*")
_WITHOUT_HEAD = {
    6: {"image": 0, "left": 1, "top": 2, "right": 3, "bottom": 4, "question": 5},  # RetinaNet
    8: {"question": 0, "left": 1, "top": 2, "right": 3, "bottom": 4, "image": 5, "width": 6, "height": 7},  # MakeSense
}
EXPECTED = "columns for the image, its box (left,top,right,bottom or x,y,w,h) and the phrase, see docs/formats.md"


@dataclass(frozen=True)
class Layout:
    """The positions of the columns.

    columns: numbers from 0 by our names; num_columns: of every line. has_sizes: right and bottom are width and height.
    has_codes: the phrases are codes of OpenImages, whose boxes are fractions.
    other_phrases: columns that may have the phrase too, where the first one has the number of a class.
    is_vertex: the cells are those of `vertex_cells`, fractions too.
    """

    columns: dict[str, int]
    num_columns: int
    delimiter: str
    other_phrases: tuple[int, ...] = ()
    has_head: bool = True
    has_sizes: bool = False
    has_codes: bool = False
    is_vertex: bool = False

    @property
    def has_fractions(self) -> bool:
        """Return whether the boxes are fractions of the photo."""
        return self.has_codes or self.is_vertex

    def cell(self, cells: list[str], name: str) -> str:
        """Return the text of a column, empty if the column does not exist."""
        return cells[self.columns[name]].strip() if name in self.columns else ""

    def phrase(self, cells: list[str]) -> str:
        """Return the phrase; of a class with number and name, as predictions of YOLO have them, the name."""
        found = self.cell(cells, "question")
        if not found.isdigit():
            return found
        others = (cells[number].strip() for number in self.other_phrases)
        return next((text for text in others if text and not text.isdigit()), found)


def layout_of(line: str) -> Layout | None:
    """Return the layout of a file with this first line, or None if something is missing."""
    rows = list(_rows_of(line))
    named = (_named(cells, delimiter) for delimiter, cells in rows)
    found = next((layout for layout in named if layout), None)
    return found or next((layout for row in rows if (layout := _without_head(*row))), None)


def describe_missing(line: str) -> str:
    """Return the names of the columns and what none of them can be."""
    _, cells = max(_rows_of(line), key=lambda row: len(row[1]), default=(",", []))
    names = [cell.strip().lower() for cell in cells]
    box = any(set(corners) <= set(names) for corners in (*_CORNER_NAMES, *_SIZE_NAMES))
    parts = {
        "image": bool(_first(names, _IMAGE)),
        "box": box,
        "phrase": bool(_first(names, (*_PHRASE, *_PHRASES_OF_CODES))),
    }
    missing = " and ".join(name for name, is_there in parts.items() if not is_there)
    return f"the first line has the columns {', '.join(names[:20])!r:.300}, none for the {missing}"


def _rows_of(line: str) -> Iterator[tuple[str, list[str]]]:
    for delimiter in _DELIMITERS:
        try:
            yield delimiter, next(csv.reader([line], delimiter=delimiter), [])
        except csv.Error:
            continue


def _named(cells: list[str], delimiter: str) -> Layout | None:
    names = [cell.strip().lower() for cell in cells]
    image, phrase = _first(names, _IMAGE), _first(names, _PHRASE)
    code = None if phrase else _first(names, _PHRASES_OF_CODES)
    corners = next((corners for corners in _CORNER_NAMES if set(corners) <= set(names)), None)
    sizes = None if corners else next((sizes for sizes in _SIZE_NAMES if set(sizes) <= set(names)), None)
    box = corners or sizes
    if not image or not box or not (phrase or code):
        return None
    found = {"image": image, **dict(zip(CORNERS, box, strict=True)), "question": phrase or code or ""}
    for ours, theirs in _OPTIONAL:
        name = _first(names, theirs)
        if name and name not in box:
            found[ours] = name
    columns = {ours: names.index(name) for ours, name in found.items()}
    others = tuple(names.index(name) for name in _PHRASE if name in names and name not in (phrase, image))
    return Layout(columns, len(names), delimiter, others, has_sizes=sizes is not None, has_codes=code is not None)


def _without_head(delimiter: str, cells: list[str]) -> Layout | None:
    """Return the layout of RetinaNet's, MakeSense's or Vertex AI's lines, by where the file and the numbers are."""
    if is_vertex(cells):
        columns = {name: number for number, name in enumerate(COLUMNS)}
        return Layout(columns, len(COLUMNS), delimiter, has_head=False, is_vertex=True)
    if len(cells) not in _WITHOUT_HEAD:
        return None
    columns = _WITHOUT_HEAD[len(cells)]
    numbers = [cells[columns[name]] for name in (*CORNERS, "width", "height") if name in columns]
    is_file = cells[columns["image"]].strip().rpartition(".")[2].lower() in IMAGE_EXTENSIONS
    is_empty = len(cells) == 6 and not any(cell.strip() for cell in cells[1:])
    if not is_file or not (is_empty or all(_NUMBER.fullmatch(text) for text in numbers)):
        return None
    return Layout(columns, len(cells), delimiter, has_head=False, has_sizes="width" in columns)


def _first(names: list[str], ours: tuple[str, ...]) -> str | None:
    return next((name for name in ours if name in names), None)
