"""Pascal VOC: one .xml file per image.

<annotation><filename>a.jpg</filename><size><width>40</width><height>30</height></size>
<object><name>dog</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object>
</annotation>

The challenge counted pixels from 1; today's tools mostly count from 0, and no file states which. The numbers are kept:
at worst a box is one pixel too far right and down. The rotated boxes of roLabelImg (<robndbox>: centre, size, angle in
radians) and CVAT (<bndbox> and the attribute "rotation" in degrees) become the upright box around them.
"""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.formats.claims import ImageClaims, OwnImage, Stated
from cogvlm_ft.shards.formats.encodings import decode_xml
from cogvlm_ft.shards.formats.folders import Photos, annotation_files, files_below
from cogvlm_ft.shards.formats.rows import read_head
from cogvlm_ft.shards.formats.shapes import box_around_rotated
from cogvlm_ft.shards.formats.sizes import SizePx, clip_to_size, stated_size
from cogvlm_ft.shards.packing.candidates import (
    Candidate,
    Problem,
    Rejected,
    check_text,
    four_numbers,
    make_targets,
    number,
    shown,
)
from cogvlm_ft.shards.packing.files import read_inside
from cogvlm_ft.terminal import counted

_ENDING = ".xml"
_CORNERS = tuple(f"bndbox/{name}" for name in ("xmin", "ymin", "xmax", "ymax"))
_ROTATED = tuple(f"robndbox/{name}" for name in ("cx", "cy", "w", "h", "angle"))
_ONCE = frozenset(("name", *_CORNERS, *_ROTATED))
_MAX_ANGLE = 2 * math.pi + 0.01
_ROOT = re.compile(r"<annotation[\s>/]")
_HEAD_BYTES = 4096
_MAX_INSPECTED = 100
_MAX_BYTES = 8 * 2**20
_ATTRIBUTE, _ROTATION = ["object", "attributes", "attribute"], "rotation"
_MAX_DEPTH = 4
"""Depth of the elements used: annotation, object, bndbox, xmin."""


@dataclass
class _Annotation:
    """Texts by their path in the XML; the first one is used. repeated: by object, what it has more than once."""

    fields: dict[str, str] = field(default_factory=dict)
    objects: list[dict[str, str]] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)


def read_voc(annotations: Path, images: Path) -> Iterator[Candidate | Problem]:
    """Yield one candidate per file, one target per class name. The folder in <path> is ignored."""
    files = annotation_files(annotations, _ENDING)
    photos = Photos(images)
    claims = ImageClaims(files, photos)
    for source in claims.sources():
        try:
            check_text(source, "sample")
            decoded = decode_xml(read_inside(files.root, source, "annotation", _MAX_BYTES))
            annotation = _parse(decoded.text)
            own = claims.image_of(source, _stated(annotation.fields.get("filename", ""), source, photos))
            if own:
                yield _candidate(annotation, source, own, decoded.notes(source))
        except Rejected as rejected:
            yield rejected.problem(source)


def recognise_voc(annotations: Path) -> str | None:
    """Look for the outermost element at the beginning of the first .xml files."""
    if annotations.is_dir():
        names = list(files_below(annotations, _ENDING))
        first = [annotations / name for name in names[:_MAX_INSPECTED]]
        what = counted(len(names), "Pascal VOC .xml file")
    else:
        first, what = [annotations], "a Pascal VOC .xml file"
    return what if any(_is_voc(path) for path in first) else None


def _is_voc(path: Path) -> bool:
    if path.suffix.lower() != _ENDING:
        return False
    return _ROOT.search(read_head(path, _HEAD_BYTES).replace(b"\0", b"").decode("latin-1")) is not None


def _parse(text: str) -> _Annotation:
    """Parse XML; raises Rejected if it is invalid or has a document type, which can define a huge text."""
    annotation = _Annotation()
    path: list[str] = []
    parts: list[str] = []
    attribute: list[str] = []

    def start(tag: str, _: dict[str, str]) -> None:
        path.append(tag)
        parts.clear()
        if path[0] != "annotation":
            raise Rejected("sample", "bad_xml", f"the outermost element is {shown(tag)}; expected annotation")
        if len(path) == 2 and tag == "object":
            annotation.objects.append({})
            annotation.repeated.append("")

    def end(_: str) -> None:
        if path[1:4] == _ATTRIBUTE and annotation.objects:
            if path[4:] == ["name"]:
                attribute[:] = ["".join(parts).strip()]
            elif path[4:] == ["value"] and attribute == [_ROTATION]:
                annotation.objects[-1][_ROTATION] = "".join(parts).strip()
        elif 1 < len(path) <= _MAX_DEPTH:
            fields, where = (annotation.objects[-1], path[2:]) if path[1] == "object" else (annotation.fields, path[1:])
            name = "/".join(where)
            if name in fields and name in _ONCE and path[1] == "object":
                annotation.repeated[-1] = name
            fields.setdefault(name, "".join(parts).strip())
        path.pop()
        parts.clear()

    def refuse(*_: object) -> None:
        raise Rejected("sample", "bad_xml", "found a DOCTYPE, which may define anything. Delete that line.")

    parser = expat.ParserCreate("utf-8")
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = parts.append
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(text.encode(), True)
    except (expat.ExpatError, ValueError) as error:
        hint = ". Write & as &amp; and < as &lt; in names." if re.search(r"&(?![#\w]+;)", text) else ""
        raise Rejected("sample", "bad_xml", f"{error}{hint}") from None
    return annotation


def _candidate(annotation: _Annotation, source: str, own: OwnImage, notes: tuple[Problem, ...]) -> Candidate:
    problems: list[Problem] = []
    boxes_of: dict[str, list[Box | None]] = {}  # None: an unusable box
    fields = annotation.fields
    size_px, size_notes = stated_size(fields.get("size/width"), fields.get("size/height"), source)
    for i, found in enumerate(annotation.objects):
        try:
            if not found.get("name"):
                raise Rejected("target", "empty_phrase", "the object has no <name>")
            boxes = boxes_of.setdefault(found["name"], [])
            boxes.append(None)
            if annotation.repeated[i]:
                detail = f"<{annotation.repeated[i]}> is there twice; expected one name and one box per <object>"
                raise Rejected("box", "bad_field", detail)
            boxes[-1] = box = _box(found, size_px)
            if _degrees(found) % 180:
                detail = f"{found['name']!r}: {list(box)}"
                problems.append(Problem("note", "box_around_rotated", detail, f"{source} object[{i}]"))
        except Rejected as rejected:
            problems.append(rejected.problem(f"{source} object[{i}]"))
    return Candidate(
        image=own.image,
        key=None,
        source=source,
        targets=make_targets(boxes_of, source, problems),
        stated_size_px=size_px,
        written_as=None if any(map(_degrees, annotation.objects)) else "corners",
        problems=(*problems, *own.notes, *size_notes, *notes),
    )


def _box(found: dict[str, str], size_px: SizePx | None) -> Box:
    """Return the box of an object. Raises Rejected."""
    if _ROTATED[0] in found and _CORNERS[0] not in found:
        return _box_around_rotated([number(found.get(name), f"<{name}>") for name in _ROTATED], size_px)
    if not any(name in found for name in _CORNERS):
        parts = ", ".join(dict.fromkeys(f"<{name.partition('/')[0]}>" for name in found if name)) or "nothing"
        detail = f"the object has no <bndbox> with xmin, ymin, xmax, ymax; found {parts}. Export boxes, or COCO."
        raise Rejected("box", "not_numeric", detail)
    corners = [number(found.get(name), f"<{name}>") for name in _CORNERS]
    box = four_numbers(corners, "[xmin, ymin, xmax, ymax]")
    degrees = _degrees(found)
    if not degrees % 360:
        return box
    center = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return clip_to_size(box_around_rotated(box, degrees, center), size_px)


def _degrees(found: dict[str, str]) -> float:
    """Return the clockwise rotation of a box of CVAT around its center, 0 for others."""
    try:
        degrees = float(found.get(_ROTATION, 0))
    except ValueError:  # another attribute of this name
        return 0.0
    return degrees if math.isfinite(degrees) else 0.0


def _box_around_rotated(values: list[float], size_px: SizePx | None) -> Box:
    """Return the upright box around centre, size and angle, which may reach over the edge. Raises Rejected."""
    x, y, width, height, angle = values
    if not abs(angle) <= _MAX_ANGLE:
        raise Rejected("box", "bad_field", f"<robndbox/angle> is {angle}; expected radians, at most 2 pi")
    cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
    half_x, half_y = (width * cos + height * sin) / 2, (width * sin + height * cos) / 2
    box = four_numbers([x - half_x, y - half_y, x + half_x, y + half_y], "of corners")
    return clip_to_size(box, size_px)


def _stated(filename: str, source: str, photos: Photos) -> Stated:
    path = posixpath.normpath(filename.replace("\\", "/")) if filename else ""
    name = posixpath.basename(path)
    return Stated(name, photos.stated(posixpath.dirname(source), path) if name else None)
