"""COCO instances JSON: "images", "annotations" with bbox [x, y, width, height], "categories".

{"images": [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}], "categories": [{"id": 7, "name": "dog"}],
 "annotations": [{"image_id": 1, "category_id": 7, "bbox": [1, 2, 20, 10], "iscrowd": 0}]}

A folder is read with all such files in it; `coco_files` finds their photos. A file is one JSON object and is read into
memory, except for the outlines, its largest part, of which the box is kept where there is no bbox.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from cogvlm_ft.data.record import is_finite_number
from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.formats.coco_bboxes import CORNERS, SIZES, Bbox, as_size, check_sizes
from cogvlm_ft.shards.formats.coco_files import coco_files, listed_photos, lists_in, recognised_files, without_repeats
from cogvlm_ft.shards.formats.coco_json import ById, as_numbers, box_of, is_crowd, load_coco, outline_beside
from cogvlm_ft.shards.formats.listed_photos import ListedPhotos, read_files
from cogvlm_ft.shards.formats.rows import are_fractions, stated_size
from cogvlm_ft.shards.packing.candidates import (
    Candidate,
    Problem,
    Rejected,
    Units,
    check_text,
    image_path,
    make_targets,
    require,
    shown,
)

_ONE_ID = "an id that no other {} has. Number them again where the files were joined, also in the annotations."
_OF_LVIS = "neg_category_ids"
"""Field of photos in which not all classes were annotated: the classes that were checked and are absent."""
_DOUBTFUL = 1.5
"""Boxes with no value above this are more likely fractions than pixels."""


@dataclass
class _Image:
    """A photo, filled with its annotations: boxes by category name, in the order of the file.

    is_repeated: it is listed under several ids. lists_all: as of Candidate.
    """

    path: str
    source: str
    stated_size_px: tuple[int, int] | None
    is_repeated: bool = False
    lists_all: bool = True
    boxes: dict[str, list[Box | None]] = field(default_factory=lambda: defaultdict(list))  # None: an unusable box
    problems: list[Problem] = field(default_factory=list)


@dataclass
class _Content:
    """What one file lists. all_are_crowds: the flag says nothing, because every annotation has it."""

    images: ById[_Image | None]
    names: ById[str]
    all_are_crowds: bool
    in_fractions: bool
    problems: list[Problem]


def read_coco(annotations: Path, images_dir: Path, layout: str | None = None) -> Iterator[Candidate | Problem]:
    """Yield one candidate per photo with one target per category. Raises DataError if there is no COCO file.

    layout: what each bbox is, if the user states it: SIZES or CORNERS.
    """
    if not annotations.is_dir():
        yield from _read_file(annotations, listed_photos(images_dir, annotations.name), layout)
        return
    names, repeats = without_repeats(coco_files(annotations))
    if not names:
        raise DataError(f"{annotations}: no COCO .json file in it or in its folders; expected one")
    for name in repeats:
        yield Problem("note", "other_file", "left out: instances_*.json beside it has the boxes of these photos", name)
    files = ((name, _read_file(annotations / name, listed_photos(images_dir, name), layout)) for name in names)
    yield from read_files(files)


def recognise_coco(annotations: Path) -> str | None:
    """Look for the COCO lists at both ends of the file, or of the first .json files of the folder."""
    if annotations.is_dir():
        names = recognised_files(annotations)
        return f"COCO files: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else None
    lists = lists_in(annotations)
    return f"a COCO object with {' and '.join(lists)}" if lists else None


def _read_file(path: Path, photos: ListedPhotos, layout: str | None) -> Iterator[Candidate | Problem]:
    value = load_coco(path)
    annotations = value["annotations"]
    if layout == CORNERS:
        _convert_corners(annotations)
    problems: list[Problem] = []
    crowds = [is_crowd(annotation) for annotation in annotations if isinstance(annotation, dict)]
    content = _Content(
        _images(value["images"], photos, problems),
        _category_names(value["categories"], problems),
        bool(crowds) and all(crowds),
        are_fractions(_boxes(annotations)),
        problems,
    )
    if layout != CORNERS:
        check_sizes(_bboxes(annotations, content.images), path, is_stated=layout == SIZES)
    for i, annotation in enumerate(annotations):
        _add_annotation(annotation, f"annotations[{i}]", content)
    _add_notes(content)
    yield from problems
    units: Units = "unit" if content.in_fractions else "pixels"
    for image in {id(image): image for image in content.images.values() if image}.values():
        yield replace(_candidate(image), units=units)


def _convert_corners(annotations: list[Any]) -> None:
    """Replace every bbox of corners; one that is not four numbers is reported when it is read."""
    for annotation in annotations:
        bbox = as_numbers(annotation.get("bbox")) if isinstance(annotation, dict) else None
        if isinstance(bbox, list) and len(bbox) == 4 and all(map(is_finite_number, bbox)):
            annotation["bbox"] = as_size(bbox)


def _boxes(annotations: list[Any]) -> Iterator[Box]:
    for annotation in annotations:
        try:
            yield box_of(annotation)[0]
        except (Rejected, AttributeError):  # the latter: it is not an object
            continue


def _bboxes(annotations: list[Any], images: ById[_Image | None]) -> Iterator[Bbox]:
    for annotation in annotations:
        if not isinstance(annotation, dict):
            continue
        bbox, image = as_numbers(annotation.get("bbox")), images.get(_hashable(annotation.get("image_id")))
        if isinstance(bbox, list) and len(bbox) == 4 and all(map(is_finite_number, bbox)):
            size_px = image.stated_size_px if image else None
            area, mode = annotation.get("area"), annotation.get("bbox_mode")
            yield Bbox(tuple(bbox), size_px, area, mode, outline_beside(annotation))


def _category_names(categories: list[Any], problems: list[Problem]) -> ById[str]:
    names = ById[str]()
    ambiguous = _ids_of_several(categories, "name")
    for i, category in enumerate(categories):
        try:
            number = _id(category, "target")
            name = category.get("name")
            require(isinstance(name, str), "target", '"name"', name, "a string")
            require(number not in ambiguous, "target", f'"id" of {name!r:.80}', number, _ONE_ID.format("category"))
            require(number not in names, "target", '"id"', number, "an id that no other category has")
            names[number] = name
        except Rejected as rejected:
            problems.append(rejected.problem(f"categories[{i}]"))
    return names


def _images(entries: list[Any], photos: ListedPhotos, problems: list[Problem]) -> ById[_Image | None]:
    """Return the photos by id; None for an unusable one, whose boxes are lost with it.

    A photo under two ids, as of two annotators or a merged file, is one photo.
    """
    images = ById[_Image | None]()
    by_path: dict[str, _Image] = {}
    ambiguous = _ids_of_several(entries, "file_name")
    for i, entry in enumerate(entries):
        try:
            number = _id(entry, "sample")
            if number in ambiguous:
                images[number] = None
                detail = f'"id" of {shown(entry.get("file_name"))}'
                require(False, "sample", detail, number, _ONE_ID.format("image"))
            require(number not in images, "sample", '"id"', number, "an id that no other image has")
            images[number] = None
            image = _Image(photos.find(_file_name(entry)), f"image id {number}", stated_size(entry))
            image.lists_all = _OF_LVIS not in entry
            first = by_path.setdefault(image.path, image)
            if first is not image:
                _join(first, image, problems)
            images[number] = first
        except Rejected as rejected:
            problems.append(rejected.problem(f"images[{i}]"))
    return images


def _ids_of_several(entries: list[Any], name: str) -> set[Any]:
    """Return the ids that entries of different names have, as in joined files: annotations could be of either."""
    names_of: dict[Any, set[str]] = defaultdict(set)
    for entry in entries:
        if isinstance(entry, dict) and isinstance(entry.get(name), str):
            names_of[_hashable(entry.get("id"))].add(entry[name])
    return {number for number, names in names_of.items() if len(names) > 1}


def _join(first: _Image, again: _Image, problems: list[Problem]) -> None:
    """Count a photo that is listed again. Raises Rejected if its size differs."""
    if first.stated_size_px and again.stated_size_px not in (None, first.stated_size_px):
        detail = f"{again.path} has {again.stated_size_px} pixels here, {first.stated_size_px} in {first.source}"
        raise Rejected("sample", "contradiction", detail)
    first.is_repeated = True
    first.stated_size_px = first.stated_size_px or again.stated_size_px
    detail = f"{again.path} is also {first.source}: one photo with the boxes of both"
    problems.append(Problem("note", "image_listed_again", detail, again.source))


def _file_name(entry: dict[str, Any]) -> str:
    """Return the path of the photo; LVIS only has the address."""
    name, address = entry.get("file_name"), entry.get("coco_url")
    check_text(name, "sample")
    if name is None and isinstance(address, str) and "://" in address:
        check_text(address, "sample")
        try:
            name = "/".join(unquote(urlsplit(address).path).split("/")[-2:])
        except ValueError:
            name = None
    return image_path(name, '"file_name"')


def _add_annotation(annotation: Any, source: str, content: _Content) -> None:
    """Put the box where it belongs, or a problem where it can be found."""
    problems = content.problems
    try:
        require(isinstance(annotation, dict), "box", "the annotation", annotation, "an object")
        image = _found(content.images, annotation, "image_id", "images")
        if image is None:
            return
        problems = image.problems
        name = _found(content.names, annotation, "category_id", "categories")
        if is_crowd(annotation):
            problems.append(_crowd_as_object(annotation, name, source, content))
        boxes = image.boxes[name]
        boxes.append(None)
        box, is_around = box_of(annotation)
        if not content.in_fractions and are_fractions([box], _DOUBTFUL):
            detail = f"{list(box)} of {name!r} could be fractions of the photo; other boxes of the file are in pixels"
            raise Rejected("box", "ambiguous_unit", detail)
        if image.is_repeated and box in boxes:
            boxes.pop()
            raise Rejected("box", "same_box", f"{list(box)} of {name!r} is in the file before, for the same photo")
        boxes[-1] = box
        if is_around:
            detail = f"{name!r} {'has no bbox' if is_around == 'outline' else 'has a rotated bbox'}: {list(box)}"
            problems.append(Problem("note", f"box_around_{is_around}", detail, source))
    except Rejected as rejected:
        problems.append(rejected.problem(source))


def _crowd_as_object(annotation: dict[str, Any], name: str, source: str, content: _Content) -> Problem:
    """Return the note that a crowd is one object; raises Rejected if it is a crowd.

    CVAT sets the flag for every brush mask, and Datumaro's writer, which it uses, adds "attributes".
    """
    if content.all_are_crowds or "attributes" in annotation:
        detail = f"{name!r} has iscrowd 1, which tools write for every mask: taken as one object"
        return Problem("note", "crowd_as_object", detail, source)
    detail = "a region around a crowd, not a single object. If a tool marks every mask so, set iscrowd to 0."
    raise Rejected("box", "crowd", f"{name!r}: {detail}")


def _found(entries: ById[Any], annotation: dict[str, Any], field_name: str, list_name: str) -> Any:
    number = _hashable(annotation.get(field_name))
    try:
        return entries.find(number)
    except (KeyError, ValueError):  # none, or several
        detail = f'no usable entry of "{list_name}" has id {number!r:.80}'
        raise Rejected("box", f"unknown_{field_name}", detail) from None


def _add_notes(content: _Content) -> None:
    num_by_text = content.images.num_by_text + content.names.num_by_text
    if num_by_text:
        detail = f"{num_by_text} ids are text where they are used and numbers where they are listed, or the reverse"
        content.problems.append(Problem("note", "ids_as_text", detail, "annotations"))
    if content.in_fractions:
        detail = "all boxes are between 0 and 1: read as fractions of the width and height of the photo"
        content.problems.append(Problem("note", "box_unit_inferred", detail, "annotations"))


def _candidate(image: _Image) -> Candidate:
    targets = make_targets(image.boxes, image.source, image.problems)
    return Candidate(
        image=image.path,
        key=None,
        source=image.source,
        targets=targets,
        stated_size_px=image.stated_size_px,
        unit_basis="documented",
        lists_all=image.lists_all,
        problems=tuple(image.problems),
    )


def _id(entry: Any, level: str) -> Any:
    require(isinstance(entry, dict), level, "the entry", entry, "an object")
    number = _hashable(entry.get("id"))
    require(number is not None, level, '"id"', entry.get("id"), "a number or a string")
    return number


def _hashable(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) else None
