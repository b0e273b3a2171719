"""ODVG, the form of Grounding DINO: one image per line (or one JSON array), boxes as corners in pixels.

{"filename": "a.jpg", "height": 30, "width": 40,
 "detection": {"instances": [{"bbox": [1, 2, 9, 9], "label": 16, "category": "dog"}]}}
{"filename": "a.jpg", "grounding": {"caption": "a red car", "regions": [{"bbox": [1, 2, 9, 9], "phrase": "a red car"}]}}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cogvlm_ft.grounding.targets import Box, Target
from cogvlm_ft.shards.formats.rows import first_objects, load_json, merge_same_image, rows_by_image, stated_size
from cogvlm_ft.shards.packing.candidates import (
    Candidate,
    Problem,
    Rejected,
    four_numbers,
    image_path,
    make_target,
    require,
    shown,
)

_CORNERS = "[x0, y0, x1, y1]"


def read_odvg(annotations: Path, images_dir: Path) -> Iterator[Candidate | Problem]:
    """Yield one candidate per image, one target per phrase or category. label_map.json names numbers."""
    names = _label_map(annotations.with_name("label_map.json"))
    expected = 'one JSON object with "filename" and "grounding" or "detection" per line'
    for rows in rows_by_image(annotations, _image, expected=expected, arrays=True):
        if isinstance(rows, Problem):
            yield rows
        else:
            yield merge_same_image([_candidate(row.value, row.source, names) for row in rows])


def recognise_odvg(annotations: Path) -> str | None:
    """Recognise objects with "filename" and "grounding" or "detection"."""
    for line in first_objects(annotations):
        for part in ("grounding", "detection"):
            if "filename" in line and isinstance(line.get(part), dict):
                return f'ODVG lines with "filename" and "{part}"'
    return None


def _label_map(path: Path) -> dict[str, str]:
    """Return the category names by number; empty if there is no such file."""
    if not path.is_file():
        return {}
    content = load_json(path, "category names by number")
    return (
        {number: name for number, name in content.items() if isinstance(name, str)} if isinstance(content, dict) else {}
    )


def _image(line: dict[str, Any]) -> str:
    found = [part for part in ("grounding", "detection") if isinstance(line.get(part), dict)]
    require(bool(found), "sample", "the line", line, 'an object called "grounding" or "detection"')
    return image_path(line.get("filename"), '"filename"')


def _candidate(line: dict[str, Any], source: str, names: dict[str, str]) -> Candidate:
    problems: list[Problem] = []
    boxes_of: dict[str, list[Box | None]] = {}  # None: an unusable box
    for part, lists in (("grounding", ("regions",)), ("detection", ("instances", "instance"))):
        content = line.get(part)
        if not isinstance(content, dict):
            continue
        name = next((name for name in lists if name in content), lists[0])
        entries = content.get(name)
        if not isinstance(entries, list):
            detail = f'"{part}" has {shown(entries)} as "{name}"; expected a list'
            problems.append(Problem("target", "bad_field", detail, source))
            continue
        for i, entry in enumerate(entries):
            _add_entry(entry, names, f"{source} {part}.{name}[{i}]", boxes_of, problems)
    return Candidate(
        image=_image(line),
        key=None,
        source=source,
        targets=tuple(_targets(boxes_of, source, problems)),
        stated_size_px=stated_size(line),
        unit_basis="documented",
        written_as="corners",
        problems=tuple(problems),
    )


def _add_entry(
    entry: Any, names: dict[str, str], source: str, boxes_of: dict[str, list[Box | None]], problems: list[Problem]
) -> None:
    try:
        require(isinstance(entry, dict), "target", "the entry", entry, 'an object with "bbox"')
        phrase = _phrase(entry, names)
        raw_boxes = entry.get("bbox")
        several = isinstance(raw_boxes, list) and bool(raw_boxes) and isinstance(raw_boxes[0], list)
        boxes = boxes_of.setdefault(phrase, [])
        for box in raw_boxes if several else [raw_boxes]:
            boxes.append(None)
            try:
                boxes[-1] = four_numbers(box, _CORNERS)
            except Rejected as rejected:
                problems.append(rejected.problem(source))
    except Rejected as rejected:
        problems.append(rejected.problem(source))


def _phrase(entry: dict[str, Any], names: dict[str, str]) -> str:
    phrase = entry.get("phrase", entry.get("category"))
    if phrase is None and "label" in entry:
        label = entry["label"]
        phrase = names.get(str(label)) if isinstance(label, (int, str)) else None
        require(phrase is not None, "target", '"label"', label, 'a "category" beside it, or its name in label_map.json')
    require(isinstance(phrase, str), "target", '"phrase" or "category"', phrase, "a string")
    return str(phrase)


def _targets(boxes_of: dict[str, list[Box | None]], source: str, problems: list[Problem]) -> Iterator[Target]:
    for phrase, boxes in boxes_of.items():
        try:
            yield make_target(phrase, [box for box in boxes if box], num_boxes_found=len(boxes))
        except Rejected as rejected:
            problems.append(rejected.problem(source))
