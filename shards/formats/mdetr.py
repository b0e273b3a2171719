"""MDETR's JSON (finetune_refcoco_*.json and the like): COCO's lists, where every entry of "images" has a "caption".

{"images": [{"id": 0, "file_name": "a.jpg", "width": 40, "height": 30, "caption": "the red car"}],
 "annotations": [{"image_id": 0, "bbox": [1, 2, 8, 7], "tokens_positive": [[0, 11]]}]}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.formats.rows import load_lists, merge_same_image, read_head, stated_size
from cogvlm_ft.shards.packing.candidates import (
    Candidate,
    Problem,
    Rejected,
    check_text,
    four_numbers,
    image_path,
    make_target,
    require,
    shown,
)
from cogvlm_ft.shards.packing.files import read_ends

_WANTED = 'MDETR\'s JSON with "images" (each with a "caption") and "annotations"'
_ENDS_BYTES = 2**16


class _Entry:
    """One entry of "images": a caption and its boxes."""

    def __init__(self, value: dict[str, Any], source: str) -> None:
        check_text(value.get("file_name"), "sample")
        self.image = image_path(value.get("file_name"), '"file_name"')
        caption = value.get("caption")
        require(isinstance(caption, str), "sample", '"caption"', caption, "the words that name the target")
        self.caption = str(caption)
        self.source = source
        self.size = stated_size(value)
        self.boxes: list[tuple[str, Box | None]] = []  # with their words; None: unusable
        self.problems: list[Problem] = []


def read_mdetr(annotations: Path, images_dir: Path) -> Iterator[Candidate | Problem]:
    """Yield one candidate per image, with one target per caption.

    If the boxes of a caption belong to different words (as in Flickr30k), each part becomes a target.
    """
    content = load_lists(annotations, _WANTED)
    problems: list[Problem] = []
    entries = _entries(content["images"], problems)
    for i, annotation in enumerate(content["annotations"]):
        _add_annotation(annotation, f"annotations[{i}]", entries, problems)
    yield from problems
    by_image: dict[str, list[Candidate]] = {}
    for entry in entries.values():
        if entry:
            by_image.setdefault(entry.image, []).append(_candidate(entry))
    yield from (merge_same_image(same) for same in by_image.values())


def recognise_mdetr(annotations: Path) -> str | None:
    """Look for token spans, which COCO does not have, at both ends of the file."""
    ends = read_ends(annotations, _ENDS_BYTES)
    if read_head(annotations, _ENDS_BYTES)[:1] != b"{":
        return None
    lists = b'"images"' in ends or b'"annotations"' in ends
    spans = b'"tokens_positive"' in ends or b'"tokens_negative"' in ends
    return 'a JSON object with captions and "tokens_positive"' if lists and spans else None


def _entries(values: list[Any], problems: list[Problem]) -> dict[Any, _Entry | None]:
    """Return the entries by id; None for an unusable one, whose boxes are lost with it."""
    entries: dict[Any, _Entry | None] = {}
    for i, value in enumerate(values):
        try:
            require(isinstance(value, dict), "sample", "the entry", value, "an object")
            number = value.get("id")
            require(isinstance(number, (int, str)), "sample", '"id"', number, "a number or a string")
            require(number not in entries, "sample", '"id"', number, "an id that no other entry has")
            entries[number] = None
            entries[number] = _Entry(value, f"images[{i}]")
        except Rejected as rejected:
            problems.append(rejected.problem(f"images[{i}]"))
    return entries


def _add_annotation(annotation: Any, source: str, entries: dict[Any, _Entry | None], problems: list[Problem]) -> None:
    try:
        require(isinstance(annotation, dict), "box", "the annotation", annotation, "an object")
        number = annotation.get("image_id")
        if not isinstance(number, (int, str)) or number not in entries:
            raise Rejected("box", "unknown_image_id", f'image_id {shown(number)} is not in "images"')
        entry = entries[number]
        if entry is None:
            return
        problems = entry.problems
        words = _words(annotation.get("tokens_positive"), entry.caption)
        entry.boxes.append((words, None))
        x, y, width, height = four_numbers(annotation.get("bbox"), "[x, y, width, height]")
        entry.boxes[-1] = words, (x, y, x + width, y + height)
    except Rejected as rejected:
        problems.append(rejected.problem(source))


def _words(spans: Any, caption: str) -> str:
    """Return the part of the caption that a box belongs to, or the whole caption if there are no token spans."""
    if spans is None:
        return caption
    require(isinstance(spans, list), "box", '"tokens_positive"', spans, "a list of [start, end]")
    parts = []
    for span in spans:
        good = isinstance(span, list) and len(span) == 2 and all(type(place) is int for place in span)
        require(good and 0 <= span[0] < span[1], "box", '"tokens_positive"', spans, "a list of [start, end]")
        parts.append(caption[span[0] : span[1]].strip())
    return " ".join(parts)


def _candidate(entry: _Entry) -> Candidate:
    boxes_of: dict[str, list[Box | None]] = {}
    for words, box in entry.boxes:
        boxes_of.setdefault(words, []).append(box)
    if len(boxes_of) == 1:
        boxes_of = {entry.caption: [box for _, box in entry.boxes]}
    targets = []
    if not entry.boxes:  # the file does not state whether that means absent
        detail = f"no usable annotation has a box for {shown(entry.caption)}"
        entry.problems.append(Problem("target", "no_boxes", detail, entry.source))
    for words, boxes in boxes_of.items():
        try:
            targets.append(make_target(words, [box for box in boxes if box], num_boxes_found=len(boxes)))
        except Rejected as rejected:
            entry.problems.append(rejected.problem(entry.source))
    return Candidate(
        image=entry.image,
        key=None,
        source=entry.source,
        targets=tuple(targets),
        stated_size_px=entry.size,
        unit_basis="documented",
        written_as="sizes",
        problems=tuple(entry.problems),
    )
