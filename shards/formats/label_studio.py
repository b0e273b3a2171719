"""Label Studio's JSON and JSON_MIN: one array of tasks, with regions in percent of the photo.

[{"id": 1, "data": {"image": "/data/upload/1/0a1b2c3d-a.jpg"}, "annotations": [{"id": 5, "result": [
  {"original_width": 40, "original_height": 30, "type": "rectanglelabels", "id": "x",
   "value": {"x": 10, "y": 10, "width": 50, "height": 20, "rotation": 0, "rectanglelabels": ["dog"]}}]}]}]

The phrase is the text written for a region, as in OCR, else its label. Of several annotations of a task the one marked
as ground truth is used, else the one changed last; boxes of the others are reported ("other_annotation"), as they show
the same objects again. Predictions are not used. A task without annotation is not a photo without objects.
"""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from cogvlm_ft.data.tars import IMAGE_EXTENSIONS
from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.formats.folders import files_below
from cogvlm_ft.shards.formats.label_studio_regions import SHAPES, photo_paths, region_box
from cogvlm_ft.shards.formats.listed_photos import ListedPhotos, once_per_photo, read_files
from cogvlm_ft.shards.formats.rows import load_json, whole_number
from cogvlm_ft.shards.packing.candidates import (
    Candidate,
    Problem,
    Rejected,
    check_text,
    make_targets,
    require,
    shown,
)
from cogvlm_ft.shards.packing.files import read_ends

_ENDING = ".json"
_EXPECTED = "the JSON or JSON_MIN export of Label Studio, an array of tasks"
_ENDS_BYTES = 2**16
_MAX_INSPECTED = 50
_LABELS = tuple(f"{shape}labels" for shape in SHAPES)
_ANNOTATION_LISTS = ("annotations", "completions")


@dataclass
class _Region:
    """One entry of a result. kind: its type without "labels"."""

    kind: str
    value: dict[str, Any]
    fields: dict[str, Any]
    source: str


@dataclass
class _Annotation:
    """What one person did in a task. rank: the highest one is used."""

    regions: list[_Region]
    name: str
    is_skipped: bool = False
    rank: tuple[bool, str, int] = (False, "", 0)


@dataclass
class _Task:
    """A task of the file. data: where the address of the photo is."""

    source: str
    data: dict[str, Any]
    annotations: list[_Annotation] = field(default_factory=list)
    has_predictions: bool = False
    problems: list[Problem] = field(default_factory=list)


def read_label_studio(annotations: Path, images: Path) -> Iterator[Candidate | Problem]:
    """Yield one candidate per task, with one target per phrase. Raises DataError if there is no such file."""
    if not annotations.is_dir():
        yield from once_per_photo(_read_file(annotations, ListedPhotos(images, "")))
        return
    names = [name for name in files_below(annotations, _ENDING) if _is_label_studio(annotations / name)]
    if not names:
        raise DataError(f"{annotations}: no .json file of Label Studio in it or in its folders; expected {_EXPECTED}")
    yield from read_files(
        (name, once_per_photo(_read_file(annotations / name, ListedPhotos(images, posixpath.dirname(name)))))
        for name in names
    )


def recognise_label_studio(annotations: Path) -> str | None:
    """Look for the names of Label Studio's fields at both ends of the file, or of the first .json files."""
    if not annotations.is_dir():
        return "an export of Label Studio" if _is_label_studio(annotations) else None
    names = list(islice(files_below(annotations, _ENDING), _MAX_INSPECTED))
    found = [name for name in names if _is_label_studio(annotations / name)]
    return f"exports of Label Studio: {', '.join(found[:3])}" if 2 * len(found) > len(names) else None


def _is_label_studio(path: Path) -> bool:
    ends = read_ends(path, _ENDS_BYTES)
    if ends.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] not in (b"[", b"{") or b'"shapes"' in ends:
        return False
    is_full = b'"result"' in ends and any(name in ends for name in (b'"to_name"', b'"was_cancelled"'))
    return is_full or any(f'"{name}"'.encode() in ends for name in _LABELS)


def _read_file(path: Path, photos: ListedPhotos) -> Iterator[Candidate | Problem]:
    content = load_json(path, _EXPECTED)
    rows = [content] if isinstance(content, dict) and ("annotations" in content or "result" in content) else content
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} holds {shown(content)}; expected {_EXPECTED}")
    tasks: dict[Any, _Task] = {}
    for i, row in enumerate(rows):
        try:
            _add_task(row, f"[{i}]", tasks)
        except Rejected as rejected:
            yield rejected.problem(f"[{i}]")
    for task in tasks.values():
        try:
            yield _candidate(task, photos)
        except Rejected as rejected:
            yield from task.problems
            yield rejected.problem(task.source)


def _add_task(row: Any, place: str, tasks: dict[Any, _Task]) -> None:
    """Add a row of the file to the tasks by id: in JSON_MIN each annotation is a row. Raises Rejected."""
    require(isinstance(row, dict), "sample", "the task", row, "an object")
    check_text(row, "sample")
    number = row.get("id")
    lists = [row[name] for name in _ANNOTATION_LISTS if isinstance(row.get(name), list)]
    if isinstance(row.get("result"), list) and isinstance(row.get("task"), dict):  # as a storage keeps it
        lists, row = [[row]], row["task"]
        number = row.get("id")
    source = f"task {number}" if isinstance(number, (int, str)) else f"task {place}"
    data = row.get("data") if lists else row
    require(isinstance(data, dict), "sample", '"data"', data, "an object")
    if lists:
        annotations = [_annotation(value, source, i) for i, value in enumerate(lists[0])]
    else:
        annotations = _annotations_of_min(row, source, place)
    addresses = sorted(value for value in data.values() if isinstance(value, str) and _is_address(value))
    task = tasks.setdefault((source, *addresses), _Task(source, data))  # joined files have several tasks of one id
    task.has_predictions |= bool(lists and row.get("predictions"))
    task.annotations += annotations


def _annotations_of_min(row: dict[str, Any], source: str, place: str) -> list[_Annotation]:
    """Return the annotation of a row of JSON_MIN, which has its regions in a list for each control."""
    regions = []
    for name, values in row.items():
        for i, value in enumerate(values if isinstance(values, list) else []):
            if isinstance(value, dict):
                regions.append(_Region(_kind_of_min(value), value, value, f"{source} {name}[{i}]"))
    if not regions and "annotation_id" not in row:
        return []
    return [_Annotation(regions, f"{place} of the file", rank=(False, str(row.get("updated_at", "")), len(place)))]


def _annotation(value: Any, source: str, index: int) -> _Annotation:
    if not isinstance(value, dict) or not isinstance(value.get("result"), list):
        raise Rejected("sample", "bad_field", f"annotation {index} is {shown(value)}; expected an object with a result")
    name = f"annotation {value.get('id', index)}"
    regions = [_region(entry, f"{source} {name} result[{i}]") for i, entry in enumerate(value["result"])]
    is_skipped = bool(value.get("was_cancelled") or value.get("skipped"))
    rank = bool(value.get("ground_truth")), str(value.get("updated_at") or value.get("created_at") or ""), index
    return _Annotation(regions, name, is_skipped, rank)


def _region(entry: Any, source: str) -> _Region:
    fields = entry if isinstance(entry, dict) else {}
    value, kind = fields.get("value"), fields.get("type")
    kind = kind if isinstance(kind, str) else "unknown"
    return _Region(_shape_of(kind), value if isinstance(value, dict) else {}, fields, source)


def _shape_of(kind: str) -> str:
    return kind.removesuffix("labels") if kind in _LABELS else kind


def _kind_of_min(value: dict[str, Any]) -> str:
    labels = [shape for shape in SHAPES if f"{shape}labels" in value]
    fields = {"points": "polygon", "radiusX": "ellipse", "rle": "brush", "width": "rectangle"}
    return labels[0] if labels else next((kind for name, kind in fields.items() if name in value), "entry")


def _candidate(task: _Task, photos: ListedPhotos) -> Candidate:
    """Return the candidate of a task. Raises Rejected if it was never annotated, or names no photo."""
    finished = [annotation for annotation in task.annotations if not annotation.is_skipped]
    used = max(finished, key=lambda annotation: annotation.rank, default=None)
    for annotation in task.annotations:
        if annotation is not used:
            reason = "skipped_annotation" if annotation.is_skipped else "other_annotation"
            detail = f"{annotation.name} was skipped" if annotation.is_skipped else f"{annotation.name} is not used"
            instead = f": {used.name} is" if used else ""
            task.problems += (Problem("box", reason, detail + instead, region.source) for region in annotation.regions)
    if used is None:
        found = "only predictions, which are not used" if task.has_predictions else "no annotation, or a skipped one"
        raise Rejected("sample", "not_annotated", f"{found}; expected an annotation. Submit the task, or remove it.")
    names = photo_paths(_address(task.data, used.regions))
    image = photos.find(*names)
    size = _size(used.regions)
    boxes_of: dict[str, list[Box | None]] = defaultdict(list)  # None: an unusable box
    texts = _texts_of_regions(used.regions)
    for region in used.regions:
        try:
            _add_region(region, size, texts, boxes_of, task.problems)
        except Rejected as rejected:
            task.problems.append(rejected.problem(region.source))
    return Candidate(
        image=image,
        key=None,
        source=task.source,
        targets=make_targets(boxes_of, task.source, task.problems),
        stated_size_px=size,
        units="pixels" if size else "unit",
        problems=tuple(task.problems),
    )


def _texts_of_regions(regions: list[_Region]) -> dict[tuple[str, str], list[str]]:
    """Return what other entries say about the region of the same id: by ("text" or "labels", id)."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for region in regions:
        for name in ("text", "labels"):
            values = region.value.get(name)
            number = region.fields.get("id")
            if region.kind not in SHAPES and isinstance(number, str):
                found[name, number] += _texts(values)
    return found


def _texts(values: Any) -> list[str]:
    values = values if isinstance(values, list) else [values]
    return [" ".join(value.split()) for value in values if isinstance(value, str) and value.strip()]


def _add_region(
    region: _Region,
    size: tuple[int, int] | None,
    texts: dict[tuple[str, str], list[str]],
    boxes_of: dict[str, list[Box | None]],
    problems: list[Problem],
) -> None:
    """Add the box of a region, under each of its labels. Raises Rejected if it has none."""
    number = str(region.fields.get("id"))
    if region.kind == "relation" or (region.kind not in SHAPES and "x" in region.value):
        detail = f"{shown(region.kind)}: belongs to a region and is no target of its own"
        problems.append(Problem("note", "not_a_target", detail, region.source))
        return
    if region.kind not in SHAPES:
        detail = f"{shown(region.kind)} {shown(region.value)} is not a region; expected {', '.join(SHAPES)}"
        raise Rejected("box", "no_area", detail)
    labels = _texts(region.value.get(f"{region.kind}labels")) or _texts(region.value.get("labels"))
    written = " ".join(texts.get(("text", number), ()))
    phrases = [written] if written else labels or texts.get(("labels", number), [])
    if not phrases:
        raise Rejected("box", "empty_phrase", f"the {region.kind} has no label. Export JSON if this is JSON_MIN.")
    for phrase in dict.fromkeys(phrases):
        boxes_of[phrase].append(None)
    if region.fields.get("image_rotation"):
        raise Rejected("box", "rotated_image", "the photo was turned in the tool. Turn it back, or turn the file.")
    if size and _size([region]) not in (None, size):
        raise Rejected("box", "contradiction", f"for a photo of {_size([region])} pixels; others have {size}")
    box = region_box(region.kind, region.value, size)
    for phrase in dict.fromkeys(phrases):
        boxes_of[phrase][-1] = box
    if region.kind != "brush" and region.value.get("rotation"):
        problems.append(Problem("note", "box_around_rotated", f"{phrases[0]!r:.80}: {list(box)}", region.source))


def _size(regions: list[_Region]) -> tuple[int, int] | None:
    for region in regions:
        width, height = (whole_number(region.fields.get(f"original_{side}")) for side in ("width", "height"))
        if width and height:
            return width, height
    return None


def _address(data: dict[str, Any], regions: list[_Region]) -> str:
    """Return the address of the photo: the only one in the data, or "image", or the one that the regions are about."""
    found = {name: value for name, value in data.items() if isinstance(value, str) and _is_address(value)}
    abouts = list(dict.fromkeys(shown(region.fields["to_name"]) for region in regions if "to_name" in region.fields))
    if len(found) > 1 and len(abouts) > 1:
        detail = f"its regions are about {' and '.join(abouts)}; expected one photo per task. Split the tasks."
        raise Rejected("sample", "several_images", detail)
    about = next((region.fields["to_name"] for region in regions if "to_name" in region.fields), "image")
    names = [name for name in (about, "image", *found) if isinstance(name, str) and name in found]
    if len(found) > 1 and names[0] not in (about, "image"):
        raise Rejected("sample", "ambiguous_image", f"the task has {', '.join(found)}; expected one photo per task")
    if not names:
        several = next((name for name, value in data.items() if isinstance(value, list) and len(value) > 1), None)
        if several:
            detail = f'"{several}" of the task is a list of photos; expected one photo per task. Split the tasks.'
            raise Rejected("sample", "several_images", detail)
        raise Rejected("sample", "bad_field", f"the data of the task is {shown(data)}; expected the address of a photo")
    return found[names[0]]


def _is_address(text: str) -> bool:
    path = text.partition("?")[0]
    is_storage = any(part in text for part in ("/data/upload/", "local-files/?d=", "fileuri=", "data:image/"))
    return is_storage or path.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
