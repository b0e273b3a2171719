"""YOLO: one .txt file per image, one line per box, and a file of class names.

0 0.5 0.5 0.2 0.1            class, then centre x, centre y, width, height as fractions of the image

A confidence after the box is ignored. A line with a class and three or more points x y is an outline and becomes the
box around it; in a source whose data.yaml has kpt_shape, the numbers after the box are keypoints. The names are in the
nearest *.yaml (with `names:`), else in classes.txt or *.names: in the folder of the labels or above, up to two folders
above the annotations. Images without a .txt file are ignored.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

from cogvlm_ft.data.tars import IMAGE_EXTENSIONS
from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.formats.claims import ImageClaims, OwnImage, Stated
from cogvlm_ft.shards.formats.folders import Photos, annotation_files, files_below
from cogvlm_ft.shards.formats.yolo_lines import MAX_BYTES, LabelLines, is_box, is_label_file, is_numbers
from cogvlm_ft.shards.formats.yolo_names import LISTS, LabelSettings, Names, load_label_settings
from cogvlm_ft.shards.packing.candidates import (
    Candidate,
    Problem,
    Rejected,
    check_text,
    make_targets,
    number,
    shown,
)
from cogvlm_ft.shards.packing.files import read_inside
from cogvlm_ft.terminal import counted

_ENDING = ".txt"
_LINE_END = re.compile("\r\n|\r|\n")
_MAX_INSPECTED = 100
_IMAGE_ENDINGS = tuple(f".{ext}" for ext in IMAGE_EXTENSIONS)

Line = tuple[int, list[str]]
"""(number, columns)"""


def read_yolo(annotations: Path, images: Path) -> Iterator[Candidate | Problem]:
    """Yield one candidate per label file, one target per class. Raises DataError without class names.

    An image is found by its name without extension.
    """
    if not annotations.is_dir():
        raise DataError(f"{annotations} is not a folder; expected the folder of the YOLO .txt files")
    files = annotation_files(annotations, _ENDING)
    photos = Photos(images)
    claims, label_lines = ImageClaims(files, photos), LabelLines(files)
    settings_of: dict[str, LabelSettings] = {}
    used: set[Path] = set()
    for source in claims.sources():
        if _is_list_of_names(files.root, source):
            continue
        folder, name = posixpath.split(files.stem(source))
        if folder not in settings_of:
            settings_of[folder] = load_label_settings(files.root, folder)
        settings = settings_of[folder]
        try:
            check_text(source, "sample")
            lines = _lines(read_inside(files.root, source, "annotation", MAX_BYTES))
            if _is_other_text(source, lines) and not photos.of_stem(folder, name):
                continue
            if settings.file not in used:
                used.add(settings.file)
                yield from settings.notes
            own = claims.image_of(source, Stated())
            if own:
                yield _candidate(lines, source, own, settings, label_lines)
        except Rejected as rejected:
            yield rejected.problem(source)
    if label_lines.num_confidences:
        detail = (
            f"{label_lines.num_confidences} boxes have a sixth number from 0 to 1; read as a confidence and ignored"
        )
        yield Problem("note", "confidence_ignored", f"{detail}. Check that it is not an angle.", ".")


def recognise_yolo(annotations: Path) -> str | None:
    """Look for a .txt file in the folder that begins with a line of at least five numbers."""
    if not annotations.is_dir():
        return None
    files = list(files_below(annotations, _ENDING))
    paths = (annotations / file for file in files)
    filled = (path for path in paths if path.is_file() and path.stat().st_size)
    is_yolo = any(is_label_file(path) for path in islice(filled, _MAX_INSPECTED))
    return f"{counted(len(files), '.txt file')} with YOLO lines" if is_yolo else None


def _is_list_of_names(root: Path, source: str) -> bool:
    return any(fnmatch(posixpath.basename(source), name) for name in LISTS) and not is_label_file(root / source)


def _is_other_text(source: str, lines: list[Line]) -> bool:
    """Return whether this is a text that exports contain besides labels: one about the data, or a list of images."""
    if posixpath.basename(source).lower().startswith("readme"):
        return True
    return bool(lines) and all(columns[-1].lower().endswith(_IMAGE_ENDINGS) for _, columns in lines)


def _lines(data: bytes) -> list[Line]:
    lines = enumerate(_LINE_END.split(data.decode("utf-8-sig", "surrogateescape")), start=1)
    return [(i, line.split()) for i, line in lines if line.strip()]


def _candidate(
    lines: list[Line], source: str, own: OwnImage, settings: LabelSettings, label_lines: LabelLines
) -> Candidate:
    """Return the candidate of a label file. Raises Rejected if no line has numbers."""
    problems: list[Problem] = []
    boxes_of: dict[str, list[Box | None]] = {}  # None: an unusable box
    if lines and not any(is_numbers(columns) for _, columns in lines):
        expected = "lines of a class number and a box"
        detail = f"no line has numbers only; expected {expected}; first: {shown(lines[0][1])}"
        raise Rejected("sample", "bad_file", detail)
    for i, columns in lines:
        try:
            boxes = boxes_of.setdefault(_class_name(columns[0], settings.names), [])
            boxes.append(None)
            boxes[-1] = label_lines.box(columns, settings.num_keypoint_columns, outlines=settings.outlines)
        except Rejected as rejected:
            problems.append(rejected.problem(f"{source}:{i}"))
    return Candidate(
        image=own.image,
        key=None,
        source=source,
        targets=make_targets(boxes_of, source, problems),
        units="unit",
        written_as="centres" if all(is_box(columns) for _, columns in lines) else None,
        problems=(*problems, *own.notes),
    )


def _class_name(column: str, names: Names) -> str:
    value = number(column, "the class number")
    if value not in names:
        raise Rejected("box", "unknown_class", f"class {column:.20} has no name; there are {len(names)} names")
    return names[int(value)]
