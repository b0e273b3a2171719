"""COCO instances JSON: "images", "annotations" with bbox [x, y, width, height], "categories".

{"images": [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}], "categories": [{"id": 7, "name": "dog"}],
 "annotations": [{"image_id": 1, "category_id": 7, "bbox": [1, 2, 20, 10], "iscrowd": 0}]}

The file is one JSON object and is read into memory, except for the outlines, its largest part.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.packing.candidates import (
    Candidate,
    Problem,
    Rejected,
    check_text,
    four_numbers,
    image_path,
    make_targets,
    require,
)
from cogvlm_ft.shards.packing.files import read_ends

_LISTS = ("images", "annotations", "categories")
_ENDS_BYTES = 2**16


class _Image:
    """One entry of "images", filled with its annotations: boxes by category name, in the order of the file."""

    def __init__(self, entry: dict[str, Any], source: str) -> None:
        check_text(entry.get("file_name"), "sample")
        self.path = image_path(entry.get("file_name"), '"file_name"')
        self.source = source
        self.stated_size_px = _size(entry)
        self.boxes: dict[str, list[Box | None]] = defaultdict(list)  # None: an unusable box
        self.problems: list[Problem] = []


def read_coco(path: Path, images_dir: Path) -> Iterator[Candidate | Problem]:
    """Yield one candidate per image with one target per category. Raises DataError if the file is not COCO."""
    content = _load(path)
    problems: list[Problem] = []
    names = _category_names(content["categories"], problems)
    images = _images(content["images"], problems)
    for i, annotation in enumerate(content["annotations"]):
        _add_annotation(annotation, f"annotations[{i}]", images, names, problems)
    yield from problems
    yield from (_candidate(image) for image in images.values() if image)


def recognise_coco(annotations: Path) -> str | None:
    """Look for the COCO lists at both ends of the file; MDETR's token spans and panoptic segments are other formats."""
    ends = read_ends(annotations, _ENDS_BYTES)
    is_object = ends.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"{"
    lists = [name for name in _LISTS if f'"{name}"'.encode() in ends]
    is_coco = lists and b'"category_id"' in ends and b'"bbox"' in ends
    is_other = any(name in ends for name in (b'"tokens_', b'"segments_info"'))
    return f"a COCO object with {' and '.join(lists)}" if is_object and is_coco and not is_other else None


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
        content = json.loads(text, object_hook=_without_outlines)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; expected COCO instances JSON") from None
    except (ValueError, RecursionError) as error:
        hint = "for one JSON object per line use --format jsonl"
        raise DataError(f"{path} is not valid JSON: {error}; expected one COCO instances object ({hint})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; expected a COCO object with {', '.join(_LISTS)}")
    missing = [name for name in _LISTS if not isinstance(content.get(name), list)]
    if missing:
        found = ", ".join(sorted(content)[:10]) or "nothing"
        missing_names = " or ".join(missing)
        raise DataError(f"{path} has no list called {missing_names}; found {found}; expected COCO instances JSON")
    first = next(iter(content["annotations"]), None)
    if isinstance(first, dict) and "segments_info" in first:
        raise DataError(
            f"{path} is COCO's panoptic JSON, which has segments; expected the instances JSON of these images"
        )
    return content


def _without_outlines(value: dict[str, Any]) -> dict[str, Any]:
    value.pop("segmentation", None)
    return value


def _category_names(categories: list[Any], problems: list[Problem]) -> dict[Any, str]:
    names: dict[Any, str] = {}
    for i, category in enumerate(categories):
        try:
            number = _id(category, "target")
            name = category.get("name")
            require(isinstance(name, str), "target", '"name"', name, "a string")
            require(number not in names, "target", '"id"', number, "an id that no other category has")
            names[number] = name
        except Rejected as rejected:
            problems.append(rejected.problem(f"categories[{i}]"))
    return names


def _images(entries: list[Any], problems: list[Problem]) -> dict[Any, _Image | None]:
    """Return the images by id; None for an unusable one, whose boxes are lost with it."""
    images: dict[Any, _Image | None] = {}
    for i, entry in enumerate(entries):
        try:
            number = _id(entry, "sample")
            require(number not in images, "sample", '"id"', number, "an id that no other image has")
            images[number] = None
            images[number] = _Image(entry, f"image id {number}")
        except Rejected as rejected:
            problems.append(rejected.problem(f"images[{i}]"))
    return images


def _add_annotation(
    annotation: Any, source: str, images: dict[Any, _Image | None], names: dict[Any, str], problems: list[Problem]
) -> None:
    """Put the box where it belongs, or a problem where it can be found."""
    try:
        require(isinstance(annotation, dict), "box", "the annotation", annotation, "an object")
        image_id, category_id = _hashable(annotation.get("image_id")), _hashable(annotation.get("category_id"))
        if image_id not in images:
            raise Rejected("box", "unknown_image_id", f'image_id {image_id!r:.80} is not in "images"')
        image = images[image_id]
        if image is None:
            return
        problems = image.problems
        if category_id not in names:
            raise Rejected("box", "unknown_category_id", f'no usable entry of "categories" has id {category_id!r:.80}')
        name = names[category_id]
        if annotation.get("iscrowd"):
            raise Rejected("box", "crowd", f"{name!r}: a region around a crowd, not a single object")
        image.boxes[name].append(None)
        x, y, width, height = four_numbers(annotation.get("bbox"), "[x, y, width, height]")
        image.boxes[name][-1] = x, y, x + width, y + height
    except Rejected as rejected:
        problems.append(rejected.problem(source))


def _candidate(image: _Image) -> Candidate:
    targets = make_targets(image.boxes, image.source, image.problems)
    return Candidate(
        image=image.path,
        key=None,
        source=image.source,
        targets=targets,
        stated_size_px=image.stated_size_px,
        problems=tuple(image.problems),
    )


def _id(entry: Any, level: str) -> Any:
    require(isinstance(entry, dict), level, "the entry", entry, "an object")
    number = _hashable(entry.get("id"))
    require(number is not None, level, '"id"', entry.get("id"), "a number or a string")
    return number


def _hashable(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) else None


def _size(entry: dict[str, Any]) -> tuple[int, int] | None:
    size = entry.get("width"), entry.get("height")
    return size if all(type(side) is int and side > 0 for side in size) else None  # type: ignore[return-value]
