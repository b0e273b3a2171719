"""labelme and X-AnyLabeling: one .json file per image.

{"imagePath": "a.jpg", "imageWidth": 40, "imageHeight": 30, "imageData": null, "shapes": [
 {"label": "dog", "description": "the dog on the left", "shape_type": "rectangle", "points": [[1, 2], [30, 20]]}]}

The phrase is the description if there is one, where OCR and captioning tools write the text, else the label. It is not
split, even if a tool wrote a list ("car | suv") or two languages; a line break becomes a space. Polygons with one
phrase and one group_id are the visible parts of one object: they get one box around all of them, and the parts after
the first are counted as "joined_part".
"""

from __future__ import annotations

import math
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cogvlm_ft.data.record import is_finite_number
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.formats.folders import Photos, annotation_files, files_below
from cogvlm_ft.shards.formats.rows import parse_object
from cogvlm_ft.shards.packing.candidates import (
    Candidate,
    Problem,
    Rejected,
    check_text,
    four_numbers,
    image_path,
    make_targets,
    require,
    shown,
)
from cogvlm_ft.shards.packing.files import MAX_ANNOTATION_BYTES, read_ends, read_inside

_ENDING = ".json"
_IGNORED = ("__ignore__", "_background_")
_MIN_POINTS = {"rectangle": 2, "mask": 2, "circle": 2, "polygon": 3, "rotation": 3, "quadrilateral": 3}
"""Minimum number of points, of the shapes with an area."""
_MAX_LOOKED_AT = 20
_ENDS_BYTES = 2**16


def read_labelme(annotations: Path, images: Path) -> Iterator[Candidate | Problem]:
    """Yield one candidate per file with one target per phrase. A missing image is later taken from "imageData"."""
    root, names = annotation_files(annotations, _ENDING)
    photos = Photos(images)
    for name in names:
        try:
            check_text(name, "sample")
            content = parse_object(read_inside(root, name, "annotation", MAX_ANNOTATION_BYTES))
            yield _candidate(content, root, name, photos)
        except Rejected as rejected:
            yield rejected.problem(name)


def recognise_labelme(annotations: Path) -> str | None:
    """Look for "shapes" at both ends of the first .json files."""
    if annotations.is_dir():
        names = list(files_below(annotations, _ENDING))
        first, what = [annotations / name for name in names[:_MAX_LOOKED_AT]], f"{len(names)} .json files of labelme"
    else:
        first, what = [annotations], "a .json file of labelme"
    return what if any(_is_labelme(path) for path in first) else None


def _is_labelme(path: Path) -> bool:
    ends = read_ends(path, _ENDS_BYTES)
    return ends.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"{" and b'"shapes"' in ends and b'"image' in ends


class _Boxes:
    """Boxes by phrase, filled shape by shape; None is an unusable box."""

    def __init__(self) -> None:
        self.of: dict[str, list[Box | None]] = {}
        self._places: dict[tuple[str, int | str], int] = {}

    def add(self, shape: Any) -> None:
        """Add a shape; raises Rejected if it is unusable or becomes part of an existing box."""
        require(isinstance(shape, dict), "box", "the shape", shape, "an object")
        phrase = _phrase(shape)
        boxes = self.of.setdefault(phrase, [])
        boxes.append(None)
        box = boxes[-1] = _box(shape)
        group = shape.get("group_id")
        if shape.get("shape_type") != "polygon" or not isinstance(group, (int, str)):
            return
        first = self._places.setdefault((phrase, group), len(boxes) - 1)
        other = boxes[first]
        if other is not None and first < len(boxes) - 1:
            boxes.pop()
            x0, y0, x1, y1 = box
            boxes[first] = min(other[0], x0), min(other[1], y0), max(other[2], x1), max(other[3], y1)
            raise Rejected("box", "joined_part", f"part of group {group} of {phrase!r:.80}: one box around all parts")


def _candidate(content: dict[str, Any], root: Path, source: str, photos: Photos) -> Candidate:
    shapes: Any = content.get("shapes")
    require(isinstance(shapes, list), "sample", '"shapes"', shapes, "a list")
    problems: list[Problem] = []
    boxes = _Boxes()
    for i, shape in enumerate(shapes):
        try:
            boxes.add(shape)
        except Rejected as rejected:
            problems.append(rejected.problem(f"{source} shapes[{i}]"))
    data = content.get("imageData")
    return Candidate(
        image=_image(content.get("imagePath"), root, source, photos),
        key=None,
        source=source,
        targets=make_targets(boxes.of, source, problems),
        stated_size_px=_size(content),
        embedded_in=root / source if isinstance(data, str) and data else None,
        problems=tuple(problems),
    )


def _phrase(shape: dict[str, Any]) -> str:
    label, description = shape.get("label"), shape.get("description")
    require(isinstance(label, str), "box", '"label"', label, "a string")
    if label in _IGNORED:
        raise Rejected("box", "ignored_label", f"label {label} marks an area without annotation")
    phrase = " ".join((description if isinstance(description, str) else "").split()) or " ".join(str(label).split())
    if not phrase:
        raise Rejected("target", "empty_phrase", "the shape has neither a description nor a label")
    return phrase


def _box(shape: dict[str, Any]) -> Box:
    """Return the box around the points or the circle. Raises Rejected."""
    kind = shape.get("shape_type") or "polygon"
    require(isinstance(kind, str), "box", '"shape_type"', kind, "a string")
    if kind not in _MIN_POINTS:
        raise Rejected("box", "no_area", f"shape_type {shown(kind)} has no area; expected {', '.join(_MIN_POINTS)}")
    points: Any = shape.get("points")
    require(isinstance(points, list), "box", '"points"', points, "a list of [x, y]")
    for point in points:
        good = isinstance(point, list) and len(point) == 2 and all(is_finite_number(place) for place in point)
        require(good, "box", "a point", point, "two finite numbers [x, y]")
    num_points, least = len(points), _MIN_POINTS[kind]
    if num_points < least or (kind == "circle" and num_points != 2):
        detail = f"{num_points} points; expected {least} {'' if kind == 'circle' else 'or more '}for a {kind}"
        raise Rejected("box", "wrong_number_of_coordinates", detail)
    xs, ys = zip(*points, strict=True)
    if kind == "circle":  # its centre, and a point on it
        radius = math.dist(*points)
        xs, ys = (xs[0] - radius, xs[0] + radius), (ys[0] - radius, ys[0] + radius)
    return four_numbers([min(xs), min(ys), max(xs), max(ys)], "of corners")


def _image(path: Any, root: Path, source: str, photos: Photos) -> str:
    """Return the image named in the file, else that name in the images folder, else the name of the .json."""
    folder, stem = posixpath.dirname(source), posixpath.basename(source)[: -len(_ENDING)]
    name = ""
    if isinstance(path, str) and path.strip():
        path = image_path(path, '"imagePath"')
        name = posixpath.basename(path)
        found = photos.at(root / folder / path) or photos.named(folder, name)
        if found:
            return found
    return photos.of_stem(folder, stem) or posixpath.join(folder, name or f"{stem}.jpg")


def _size(content: dict[str, Any]) -> tuple[int, int] | None:
    size = content.get("imageWidth"), content.get("imageHeight")
    return size if all(type(side) is int and side > 0 for side in size) else None  # type: ignore[return-value]
