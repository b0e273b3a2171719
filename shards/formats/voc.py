"""Pascal VOC: one .xml file per image.

<annotation><filename>a.jpg</filename><size><width>40</width><height>30</height></size>
<object><name>dog</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object>
</annotation>

The challenge counted pixels from 1; today's tools mostly count from 0, and no file states which. The numbers are kept:
at worst a box is one pixel too far right and down.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.formats.folders import Photos, annotation_files, files_below
from cogvlm_ft.shards.formats.rows import read_head
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

_ENDING = ".xml"
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_MAX_BYTES = 8 * 2**20
_MAX_DEPTH = 4
"""Depth of the elements used: annotation, object, bndbox, xmin."""


@dataclass
class _Annotation:
    """Texts by their path in the XML; the first one is used."""

    fields: dict[str, str] = field(default_factory=dict)
    objects: list[dict[str, str]] = field(default_factory=list)


def read_voc(annotations: Path, images: Path) -> Iterator[Candidate | Problem]:
    """Yield one candidate per file, one target per class name. The folder in <path> is ignored."""
    root, names = annotation_files(annotations, _ENDING)
    photos = Photos(images)
    for name in names:
        try:
            check_text(name, "sample")
            yield _candidate(_parse(read_inside(root, name, "annotation", _MAX_BYTES)), name, photos)
        except Rejected as rejected:
            yield rejected.problem(name)


def recognise_voc(annotations: Path) -> str | None:
    """Inspect the first .xml file."""
    if annotations.is_dir():
        names = list(files_below(annotations, _ENDING))
        first, what = annotations / (names[0] if names else ""), f"{len(names)} Pascal VOC .xml files"
    else:
        first, what = annotations, "a Pascal VOC .xml file"
    is_voc = first.suffix.lower() == _ENDING and b"<annotation>" in read_head(first, 4096)
    return what if is_voc else None


def _parse(data: bytes) -> _Annotation:
    """Parse XML; raises Rejected if it is invalid or has a document type, which can define a huge text."""
    annotation = _Annotation()
    path: list[str] = []
    text: list[str] = []

    def start(tag: str, _: dict[str, str]) -> None:
        path.append(tag)
        text.clear()
        if path[0] != "annotation":
            raise Rejected("sample", "bad_xml", f"the outermost element is {shown(tag)}; expected annotation")
        if len(path) == 2 and tag == "object":
            annotation.objects.append({})

    def end(_: str) -> None:
        if 1 < len(path) <= _MAX_DEPTH:
            fields, where = (annotation.objects[-1], path[2:]) if path[1] == "object" else (annotation.fields, path[1:])
            fields.setdefault("/".join(where), "".join(text).strip())
        path.pop()
        text.clear()

    def refuse(*_: object) -> None:
        raise Rejected("sample", "bad_xml", "found a DOCTYPE, which may define anything. Delete that line.")

    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = text.append
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, ValueError, LookupError) as error:  # the last two: an unknown encoding
        raise Rejected("sample", "bad_xml", str(error)) from None
    return annotation


def _candidate(annotation: _Annotation, source: str, photos: Photos) -> Candidate:
    problems: list[Problem] = []
    boxes_of: dict[str, list[Box | None]] = {}  # None: an unusable box
    for i, found in enumerate(annotation.objects):
        try:
            if not found.get("name"):
                raise Rejected("target", "empty_phrase", "the object has no <name>")
            boxes = boxes_of.setdefault(found["name"], [])
            boxes.append(None)
            corners = [number(found.get(f"bndbox/{name}"), f"<{name}>") for name in _CORNERS]
            boxes[-1] = four_numbers(corners, "[xmin, ymin, xmax, ymax]")
        except Rejected as rejected:
            problems.append(rejected.problem(f"{source} object[{i}]"))
    return Candidate(
        image=_image(annotation.fields.get("filename", ""), source, photos),
        key=None,
        source=source,
        targets=make_targets(boxes_of, source, problems),
        stated_size_px=_size(annotation.fields),
        problems=tuple(problems),
    )


def _image(filename: str, source: str, photos: Photos) -> str:
    """Return the image named in the file, else the one with the name of the .xml."""
    folder, stem = posixpath.dirname(source), posixpath.basename(source)[: -len(_ENDING)]
    name = posixpath.basename(filename.replace("\\", "/"))
    found = photos.named(folder, name) or photos.of_stem(folder, stem)
    return found or posixpath.join(folder, name or f"{stem}.jpg")


def _size(fields: dict[str, str]) -> tuple[int, int] | None:
    """Return (width, height), or None if missing or 0, which some tools write."""
    try:
        width, height = int(fields["size/width"]), int(fields["size/height"])
    except (KeyError, ValueError):
        return None
    return (width, height) if width > 0 and height > 0 else None
