"""CVAT's own XML, "CVAT for images 1.1" and "CVAT for video 1.1": one file for all photos of a task.

<annotations><image id="0" name="sub/a.jpg" width="40" height="30">
<box label="dog" xtl="1" ytl="2" xbr="30" ybr="20" rotation="0"/><polygon label="cat" points="1,2;30,2;30,20"/>
</image></annotations>

The label is the phrase. Shapes with an area become the box around them; polygons and masks of one label and group_id
are parts of one object ("joined_part"). Tracks are read frame by frame, from photos called frame_000000.png; where
the object is outside, nothing is lost and a note is written. Points, lines, skeletons and tags have no box. A subset
called Train, Validation or Test is the split of its photos.
"""

from __future__ import annotations

import math
import posixpath
from codecs import getincrementaldecoder
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple
from xml.parsers import expat

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.plain_files import open_regular
from cogvlm_ft.shards.formats.encodings import decode_xml
from cogvlm_ft.shards.formats.folders import files_below
from cogvlm_ft.shards.formats.listed_photos import ListedPhotos, once_per_photo, read_files
from cogvlm_ft.shards.formats.rows import read_head, stated_size
from cogvlm_ft.shards.formats.shapes import box_around, box_around_ellipse, box_around_rotated
from cogvlm_ft.shards.packing.candidates import (
    Candidate,
    Problem,
    Rejected,
    four_numbers,
    image_path,
    make_targets,
    number,
    require,
    shown,
)
from cogvlm_ft.shards.packing.given_splits import split_of_folder

_ENDING = ".xml"
_CHUNK_BYTES = 2**20
_MAX_INSPECTED = 50
_CORNERS = ("xtl", "ytl", "xbr", "ybr")
_CUBOID = tuple(f"{corner}{face}" for face in "12" for corner in ("tl", "bl", "tr", "br"))
_WITHOUT_BOX = {
    "points": "points have no area",
    "polyline": "a line has no area",
    "skeleton": "its points are inside the object, not around it",
    "tag": "it is about the whole photo",
}
_JOINED = ("polygon", "mask")
_FRAME_ENDINGS = ("PNG", "png", "jpg", "jpeg", "JPG")
_FRAME_HINT = "Tracks contain numbers instead of names. Export CVAT for images, or the frames with Save images."
_SIZE = ("original_size/width", "original_size/height")


class _Shape(NamedTuple):
    """A shape as written. fields: its attributes, with the label of its track."""

    kind: str
    fields: dict[str, str]
    source: str


@dataclass
class _Entry:
    """A photo as written. names: how its file may be called."""

    names: tuple[str | None, ...]
    fields: dict[str, str]
    source: str
    shapes: list[_Shape] = field(default_factory=list)


def read_cvat(annotations: Path, images: Path) -> Iterator[Candidate | Problem]:
    """Yield one candidate per photo, with one target per label. Raises DataError if there is no such file."""
    if not annotations.is_dir():
        yield from once_per_photo(_read_file(annotations, "", images))
        return
    names = [name for name in files_below(annotations, _ENDING) if _is_cvat(annotations / name)]
    if not names:
        raise DataError(f"{annotations}: no CVAT .xml file in it or in its folders; expected one")
    yield from read_files(
        (name, once_per_photo(_read_file(annotations / name, posixpath.dirname(name), images))) for name in names
    )


def recognise_cvat(annotations: Path) -> str | None:
    """Look for the outermost element of the file, or of the first .xml files of the folder."""
    if not annotations.is_dir():
        return "a CVAT .xml file" if _is_cvat(annotations) else None
    names = [name for name, _ in zip(files_below(annotations, _ENDING), range(_MAX_INSPECTED), strict=False)]
    found = [name for name in names if _is_cvat(annotations / name)]
    return f"CVAT files: {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}" if found else None


def _is_cvat(path: Path) -> bool:
    return path.suffix.lower() == _ENDING and b"<annotations>" in read_head(path, 4096).replace(b"\0", b"")


class _Parser:
    """Reads the XML part by part. done: the photos that are complete."""

    def __init__(self, path: Path) -> None:
        self.done: list[_Entry] = []
        self._file = path
        self._frames: dict[str, _Entry] = {}
        self._size: dict[str, str] = {}
        self._path: list[str] = []
        self._text: list[str] = []
        self._entry: _Entry | None = None
        self._track: dict[str, str] = {}
        self._num_tracks = 0
        self._expat = expat.ParserCreate("utf-8")
        self._expat.buffer_text = True
        self._expat.StartElementHandler, self._expat.EndElementHandler = self._start, self._end
        self._expat.CharacterDataHandler = self._text.append
        self._expat.StartDoctypeDeclHandler = self._refuse

    def feed(self, data: bytes) -> None:
        """Parse a part of the file, the empty one at its end. Raises Rejected."""
        try:
            self._expat.Parse(data, not data)
        except (expat.ExpatError, ValueError, LookupError) as error:  # the last two: an unknown encoding
            raise Rejected("sample", "bad_xml", f"{error}; this photo and what follows is lost") from None
        finally:
            if not data:
                self.end_tracks()

    def end_tracks(self) -> None:
        """Complete the photos of the tracks, which come one by one over all frames."""
        for frame in self._frames.values():
            frame.fields.update(self._size)
        self.done += self._frames.values()
        self._frames = {}

    def _start(self, tag: str, fields: dict[str, str]) -> None:
        self._path.append(tag)
        self._text.clear()
        if self._path[0] != "annotations":
            raise DataError(f"{self._file}: the outermost element is {shown(tag)}; expected CVAT's annotations")
        if len(self._path) == 2 and tag == "image":
            self._entry = _Entry((fields.get("name"),), fields, f"image id {fields.get('id')}")
        elif len(self._path) == 2 and tag == "track":
            self._track = fields
            self._num_tracks += 1
        elif len(self._path) == 3 and self._path[1] == "image" and self._entry:
            source = f"{self._entry.source} {tag}[{len(self._entry.shapes)}]"
            self._entry.shapes.append(_Shape(tag, fields, source))
        elif len(self._path) == 3 and self._path[1] == "track":
            self._add_to_frame(tag, fields)

    def _add_to_frame(self, kind: str, fields: dict[str, str]) -> None:
        frame = fields.get("frame", "")
        stem = f"frame_{frame.zfill(6)}"
        entry = self._frames.setdefault(
            frame, _Entry(tuple(f"{stem}.{ending}" for ending in _FRAME_ENDINGS), {}, f"frame {frame}")
        )
        track = self._track.get("id", self._num_tracks - 1)
        entry.shapes.append(_Shape(kind, {**self._track, **fields}, f"track id {track} {kind} frame {frame}"))

    def _end(self, _: str) -> None:
        for name in _SIZE:
            if self._path[1:2] == ["meta"] and "/".join(self._path[-2:]) == name:
                self._size[name.rpartition("/")[2]] = "".join(self._text)
        if len(self._path) == 2 and self._entry:
            self.done.append(self._entry)
            self._entry = None
        self._path.pop()
        self._text.clear()

    def _refuse(self, *_: object) -> None:
        raise Rejected("sample", "bad_xml", "found a DOCTYPE, which may define anything. Delete that line.")


def _read_file(path: Path, folder: str, images: Path) -> Iterator[Candidate | Problem]:
    photos: dict[str, ListedPhotos] = {}  # by subset
    num_entries = 0
    for entry in _entries(path):
        num_entries += 1
        if isinstance(entry, Problem):
            yield entry
            continue
        subset = entry.fields.get("subset", "")
        if subset not in photos:
            photos[subset] = ListedPhotos(images, folder, *([subset] if subset else []))
        try:
            yield _candidate(entry, photos[subset])
        except Rejected as rejected:
            yield rejected.problem(entry.source)
    if not num_entries:
        raise DataError(f"{path}: no image and no track; expected a file of CVAT for images 1.1 or for video 1.1")


def _entries(path: Path) -> Iterator[_Entry | Problem]:
    parser = _Parser(path)
    try:
        with ExitStack() as stack:
            file, notes = _open_utf8(path, stack)
            yield from notes
            while True:
                data = file.read(_CHUNK_BYTES)
                try:
                    parser.feed(data)
                finally:
                    yield from parser.done
                    parser.done.clear()
                if not data:
                    return
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; expected CVAT's XML") from None
    except Rejected as rejected:
        parser.end_tracks()
        yield from parser.done
        yield rejected.problem(path.name)


def _open_utf8(path: Path, stack: ExitStack) -> tuple[BinaryIO, tuple[Problem, ...]]:
    """Return the file in UTF-8, with notes; in memory if it is in another encoding. Raises Rejected if in none."""
    file = stack.enter_context(open_regular(path))
    decoder = getincrementaldecoder("utf-8-sig")()
    try:
        while data := file.read(_CHUNK_BYTES):
            decoder.decode(data)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        file.seek(0)
        decoded = decode_xml(file.read())
        return BytesIO(decoded.text.encode()), decoded.notes(path.name)
    file.seek(0)
    return file, ()


def _candidate(entry: _Entry, photos: ListedPhotos) -> Candidate:
    image = photos.find(*(image_path(name, '"name"') for name in entry.names))
    problems: list[Problem] = []
    boxes_of: dict[str, list[Box | None]] = {}  # None: an unusable box
    places: dict[tuple[str, str], int] = {}  # of the first part of each group
    for shape in entry.shapes:
        try:
            _add_shape(shape, boxes_of, places, problems)
        except Rejected as rejected:
            problems.append(rejected.problem(shape.source))
    return Candidate(
        image=image,
        key=None,
        source=entry.source,
        targets=make_targets(boxes_of, entry.source, problems),
        stated_size_px=stated_size(entry.fields),
        problems=tuple(problems),
        image_hint=_FRAME_HINT if len(entry.names) > 1 else "",
        split=split_of_folder(entry.fields.get("subset", "")),
    )


def _add_shape(
    shape: _Shape, boxes_of: dict[str, list[Box | None]], places: dict[tuple[str, str], int], problems: list[Problem]
) -> None:
    """Add the box around a shape. Raises Rejected if it has none, or becomes part of an existing one."""
    label = " ".join(shape.fields.get("label", "").split())
    if shape.fields.get("outside") == "1":
        problems.append(Problem("note", "outside", f"{label!r} is not visible in this frame", shape.source))
        return
    if not label:
        raise Rejected("box", "empty_phrase", f"the {shape.kind} has no label")
    boxes = boxes_of.setdefault(label, [])
    boxes.append(None)
    box = _box(shape)
    boxes[-1] = box
    if shape.kind in ("box", "ellipse") and _number(shape.fields, "rotation", "0") % 180:
        problems.append(Problem("note", "box_around_rotated", f"{label!r}: {list(box)}", shape.source))
    group = shape.fields.get("group_id", "").strip()
    if shape.kind not in _JOINED or group in ("", "0"):
        return
    first = places.setdefault((label, group), len(boxes) - 1)
    other = boxes[first]
    if other is not None and first < len(boxes) - 1:
        boxes.pop()
        boxes[first] = box_around([other[:2], other[2:], box[:2], box[2:]])
        raise Rejected("box", "joined_part", f"part of group {group} of {label!r:.80}: one box around all parts")


def _box(shape: _Shape) -> Box:
    """Return the box around the shape. Raises Rejected."""
    fields = shape.fields
    if shape.kind in _WITHOUT_BOX:
        advice = f"{_WITHOUT_BOX[shape.kind]}. Draw a box if the object is to be found."
        raise Rejected("box", "no_area", f"{shape.kind} of {shown(fields.get('label'))}: {advice}")
    if shape.kind == "box":
        box = _numbers(fields, *_CORNERS)
        center = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        degrees = _number(fields, "rotation", "0")
        found = box_around_rotated(box, degrees, center) if degrees else box
    elif shape.kind == "polygon":
        found = box_around(_points(fields.get("points", "")))
    elif shape.kind == "ellipse":
        x, y, *radii = _numbers(fields, "cx", "cy", "rx", "ry")
        require(min(radii) >= 0, "box", "the radii", radii, "numbers from 0 on")
        found = box_around_ellipse((x, y), (radii[0], radii[1]), _number(fields, "rotation", "0"))
    elif shape.kind == "mask":
        left, top, width, height = _numbers(fields, "left", "top", "width", "height")
        found = left, top, left + width, top + height
    elif shape.kind == "cuboid":
        found = box_around([(_number(fields, f"x{corner}"), _number(fields, f"y{corner}")) for corner in _CUBOID])
    else:
        raise Rejected("box", "unknown_shape", f"{shown(shape.kind)}; expected a box, polygon, ellipse, mask or cuboid")
    return four_numbers(list(found), "of corners")


def _number(fields: dict[str, str], name: str, default: str | None = None) -> float:
    """Return the finite number in this field. Raises Rejected."""
    found = number(fields.get(name, default), name)
    require(math.isfinite(found), "box", name, found, "a finite number")
    return found


def _numbers(fields: dict[str, str], *names: str) -> Box:
    return four_numbers([number(fields.get(name), name) for name in names], ", ".join(names))


def _points(text: str) -> list[tuple[float, float]]:
    """Parse x,y;x,y of at least three points. Raises Rejected."""
    points = []
    for pair in text.split(";"):
        x, comma, y = pair.partition(",")
        require(bool(comma), "box", '"points"', text, "x,y;x,y;x,y")
        points.append((_number({"x": x}, "x"), _number({"y": y}, "y")))
    require(len(points) > 2, "box", '"points"', text, "three points or more")
    return points
