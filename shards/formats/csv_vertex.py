"""The lines of Vertex AI's CSV (AutoML object detection), which have no column names.

TRAINING,gs://bucket/photos/a.jpg,dog,0.1,0.2,,,0.3,0.4,,
gs://bucket/photos/a.jpg,cat,0.5,0.5,0.7,0.5,0.7,0.9,0.5,0.9
TEST,gs://bucket/photos/b.jpg,,,,,,,,,

A set, which may be missing, the address of the photo, a label, and two opposite corners (the first and third of four)
or all four, as fractions of the photo.
"""

from __future__ import annotations

from cogvlm_ft.shards.packing.candidates import Rejected, shown

COLUMNS = ("split", "image", "question", "left", "top", "right", "bottom")
"""Names of the cells that `vertex_cells` returns."""
_SPLITS = {
    "": "",
    "train": "train",
    "training": "train",
    "validate": "val",
    "validation": "val",
    "test": "test",
    "unassigned": "",
}
_SCHEME = "gs://"
_NUM_VALUES = 8
_OPPOSITE = (0, 1, 4, 5)
_SAME = 1e-4
"""Difference of corners, as a fraction of the photo, that rounding explains."""


def is_vertex(cells: list[str]) -> bool:
    """Return whether a line has the address of a photo, and a label with a box or neither."""
    rest = _without_set(cells)
    return bool(rest) and rest[0].startswith(_SCHEME) and len(rest) in (1, 2 + _NUM_VALUES)


def vertex_cells(cells: list[str]) -> list[str]:
    """Return the cells in the order of COLUMNS; the image is the path below the bucket. Raises Rejected."""
    rest = _without_set(cells)
    if not rest or not rest[0].startswith(_SCHEME):
        detail = f"the line begins with {shown(','.join(cells[:2]))}; expected a set of Vertex AI and {_SCHEME}"
        raise Rejected("target", "bad_field", detail)
    split = _SPLITS[cells[0].strip().lower()] if len(rest) < len(cells) else ""
    image = rest[0].removeprefix(_SCHEME).partition("/")[2]
    label, *values = [cell.strip() for cell in rest[1:]] or [""]
    if not label and not any(values):
        return [split, image, "", "", "", "", ""]
    if len(values) != _NUM_VALUES:
        detail = f"{len(values)} values after the label; expected {_NUM_VALUES}: the corners of a box"
        raise Rejected("target", "wrong_number_of_columns", detail)
    return [split, image, label, *_corners(values)]


def _without_set(cells: list[str]) -> list[str]:
    is_set = bool(cells) and cells[0].strip().lower() in _SPLITS
    return [cell.strip() for cell in cells[:2]][is_set:] + cells[2:]


def _corners(values: list[str]) -> list[str]:
    """Return left, top, right, bottom of two opposite corners or of four that form an upright rectangle."""
    filled = tuple(number for number, value in enumerate(values) if value)
    if filled not in (_OPPOSITE, tuple(range(_NUM_VALUES))):
        detail = f"{shown(','.join(values))}; expected two opposite corners as x,y,,,x,y,, or all four"
        raise Rejected("box", "ambiguous_box", detail)
    try:
        numbers = [float(values[number]) for number in filled]
    except ValueError:
        raise Rejected("box", "not_numeric", f"{shown(','.join(values))}; expected numbers") from None
    xs, ys = numbers[::2], numbers[1::2]
    left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
    rectangle = [(left, top), (right, top), (right, bottom), (left, bottom)]
    if len(filled) == _NUM_VALUES and not all(
        _is_among(corner, list(zip(xs, ys, strict=True))) for corner in rectangle
    ):
        detail = f"{shown(','.join(values))}; expected the four corners of an upright rectangle"
        raise Rejected("box", "ambiguous_box", detail)
    return [repr(number) for number in (left, top, right, bottom)]


def _is_among(corner: tuple[float, float], points: list[tuple[float, float]]) -> bool:
    return any(abs(x - corner[0]) <= _SAME and abs(y - corner[1]) <= _SAME for x, y in points)
