"""labelme and X-AnyLabeling: one .json file per image.

{"imagePath": "a.jpg", "imageWidth": 40, "imageHeight": 30, "imageData": null, "shapes": [
 {"label": "dog", "description": "the dog on the left", "shape_type": "rectangle", "points": [[1, 2], [30, 20]]}]}

The phrase is the description if there is one, where OCR and captioning tools write the text, else the label. It is not
split, even if a tool wrote a list ("car | suv") or two languages; a line break becomes a space. Shapes with one label
and one group_id are the visible parts of one object, as in labelme's own converters: they get one box around all of
them, and the parts after the first are counted as "joined_part". Shapes that the tool lets reach over the edge of the
image are cut there.
"""

from __future__ import annotations

import math
import posixpath
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvlm_ft.data.record import is_finite_number
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.formats.claims import ImageClaims, OwnImage, Stated
from cogvlm_ft.shards.formats.encodings import Decoded, decode_text
from cogvlm_ft.shards.formats.folders import Photos, annotation_files, files_below
from cogvlm_ft.shards.formats.rows import parse_object
from cogvlm_ft.shards.formats.sizes import SizePx, clip_to_size, stated_size
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
from cogvlm_ft.terminal import counted

_ENDING = ".json"
_IGNORED = ("__ignore__", "_background_")
_MIN_POINTS = {
    "rectangle": 2,
    "mask": 2,
    "circle": 2,
    "polygon": 3,
    "rotation": 3,
    "oriented_rectangle": 3,
    "quadrilateral": 3,
    "cuboid": 4,
}
"""Minimum number of points of each kind of shape with an area."""
_OVER_THE_EDGE = ("circle", "rotation", "oriented_rectangle", "cuboid")
_MAX_INSPECTED = 100
_ENDS_BYTES = 2**16


def read_labelme(annotations: Path, images: Path) -> Iterator[Candidate | Problem]:
    """Yield one candidate per file with one target per phrase. A missing image is later taken from "imageData"."""
    files = annotation_files(annotations, _ENDING)
    photos = Photos(images)
    claims = ImageClaims(files, photos)
    for source in claims.sources():
        try:
            check_text(source, "sample")
            data = read_inside(files.root, source, "annotation", MAX_ANNOTATION_BYTES)
            decoded = Decoded("") if data.isascii() else decode_text(data)
            content = parse_object(decoded.text.encode() or data)
            require(isinstance(content.get("shapes"), list), "sample", '"shapes"', content.get("shapes"), "a list")
            own = claims.image_of(source, _stated(content, files.root, source, photos))
            if own:
                yield _candidate(content, files.root, source, own, decoded.notes(source))
        except Rejected as rejected:
            yield rejected.problem(source)


def recognise_labelme(annotations: Path) -> str | None:
    """Look for "shapes" at both ends of the first .json files."""
    if annotations.is_dir():
        names = list(files_below(annotations, _ENDING))
        first = [annotations / name for name in names[:_MAX_INSPECTED]]
        what = f"{counted(len(names), '.json file')} of labelme"
    else:
        first, what = [annotations], "a .json file of labelme"
    return what if any(_is_labelme(path) for path in first) else None


def _is_labelme(path: Path) -> bool:
    ends = read_ends(path, _ENDS_BYTES)
    return ends.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"{" and b'"shapes"' in ends and b'"image' in ends


@dataclass
class _Object:
    """One object, of one or more shapes. box: None if no shape is usable. description: what a shape says besides."""

    label: str
    description: str = ""
    box: Box | None = None

    @property
    def phrase(self) -> str:
        return self.description or self.label

    def may_have(self, other: _Object) -> bool:
        """Return whether another shape of the same label and group is part of this object, by their descriptions."""
        return not (self.description and other.description) or self.description == other.description

    def join(self, other: _Object) -> None:
        """Add a shape; both have a box."""
        assert self.box and other.box
        self.description = self.description or other.description
        x0, y0, x1, y1 = self.box
        self.box = min(x0, other.box[0]), min(y0, other.box[1]), max(x1, other.box[2]), max(y1, other.box[3])


class _Objects:
    """The objects of an image, filled shape by shape."""

    def __init__(self, size_px: SizePx | None) -> None:
        self._size_px = size_px
        self._all: list[_Object] = []
        self._of_group: dict[tuple[str, str], list[_Object]] = defaultdict(list)

    def add(self, shape: Any) -> None:
        """Add a shape; raises Rejected if it is unusable or becomes part of an existing object."""
        require(isinstance(shape, dict), "box", "the shape", shape, "an object")
        found = _Object(*_texts(shape))
        self._all.append(found)
        found.box = _box(shape, self._size_px)
        group = _group(shape.get("group_id"))
        if not group:
            return
        parts = self._of_group[found.label, group]
        first = next((part for part in parts if part.may_have(found)), None)
        if first is None:
            parts.append(found)
            return
        self._all.pop()
        first.join(found)
        detail = f"part of group {group:.80} of {first.phrase!r:.80}: one box around all parts"
        raise Rejected("box", "joined_part", detail)

    def boxes_of(self) -> dict[str, list[Box | None]]:
        """Return the boxes by phrase, in the order of the first shapes; None is an unusable box."""
        found: dict[str, list[Box | None]] = {}
        for one in self._all:
            found.setdefault(one.phrase, []).append(one.box)
        return found


def _candidate(
    content: dict[str, Any], root: Path, source: str, own: OwnImage, notes: tuple[Problem, ...]
) -> Candidate:
    problems: list[Problem] = []
    size_px, size_notes = stated_size(content.get("imageWidth"), content.get("imageHeight"), source)
    objects = _Objects(size_px)
    for i, shape in enumerate(content["shapes"]):
        try:
            objects.add(shape)
        except Rejected as rejected:
            problems.append(rejected.problem(f"{source} shapes[{i}]"))
    return Candidate(
        image=own.image,
        key=None,
        source=source,
        targets=make_targets(objects.boxes_of(), source, problems),
        stated_size_px=size_px,
        embedded_in=root / source if _is_embedded(content) else None,
        problems=(*problems, *own.notes, *size_notes, *notes),
    )


def _texts(shape: dict[str, Any]) -> tuple[str, str]:
    """Return label and description, each on one line. Raises Rejected if there is neither."""
    label, description = shape.get("label"), shape.get("description")
    require(isinstance(label, str), "box", '"label"', label, "a string")
    if label in _IGNORED:
        raise Rejected("box", "ignored_label", f"label {label} marks an area without annotation")
    texts = " ".join(str(label).split()), " ".join((description if isinstance(description, str) else "").split())
    if not any(texts):
        raise Rejected("target", "empty_phrase", "the shape has neither a description nor a label")
    return texts


def _box(shape: dict[str, Any], size_px: SizePx | None) -> Box:
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
    box = four_numbers([min(xs), min(ys), max(xs), max(ys)], "of corners")
    return clip_to_size(box, size_px) if kind in _OVER_THE_EDGE else box


def _group(value: Any) -> str:
    """Return the group of a shape, or "" for none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() if isinstance(value, (int, str)) and not isinstance(value, bool) else ""


def _is_embedded(content: dict[str, Any]) -> bool:
    data = content.get("imageData")
    return isinstance(data, str) and bool(data)


def _stated(content: dict[str, Any], root: Path, source: str, photos: Photos) -> Stated:
    path, folder = content.get("imagePath"), posixpath.dirname(source)
    if not isinstance(path, str) or not path.strip():
        return Stated(embedded=_is_embedded(content))
    path = image_path(path, '"imagePath"')
    found = photos.at(root / folder / path) or photos.stated(folder, path)
    return Stated(posixpath.basename(path), found, _is_embedded(content))
