"""RefCOCO, RefCOCO+ and RefCOCOg as published: refs(unc).p, refs(google).p or refs(umd).p next to instances.json.

refs: [{"ref_id": 0, "ann_id": 7, "image_id": 5, "file_name": "COCO_train2014_000000000005_0.jpg",
        "sentences": [{"sent": "the red car", ...}, ...], "split": "train", ...}, ...]
Their split is not used: the builder splits by image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Box, Target
from cogvlm_ft.shards.formats.plain_pickle import load_plain_pickle
from cogvlm_ft.shards.formats.rows import load_lists, stated_size
from cogvlm_ft.shards.packing.candidates import (
    Candidate,
    Problem,
    Rejected,
    check_text,
    four_numbers,
    image_path,
    make_target,
    shown,
)

_REFS_NAME = re.compile(r"refs\(\w+\)\.p")


class _Instances:
    """The content of instances.json by id. Unusable entries are missing; only refs that need them are lost."""

    def __init__(self, path: Path) -> None:
        content = load_lists(path, "the instances.json that RefCOCO publishes beside its refs")
        self.boxes = {entry.get("id"): entry.get("bbox") for entry in _with_id(content["annotations"])}
        self.images = {
            entry.get("id"): (entry.get("file_name"), stated_size(entry)) for entry in _with_id(content["images"])
        }


def read_refcoco(annotations: Path, images_dir: Path) -> Iterator[Candidate | Problem]:
    """Yield one candidate per image, one target per sentence. annotations: the folder, or its refs file."""
    refs_path = _refs_path(annotations)
    refs = load_plain_pickle(refs_path)
    if not isinstance(refs, list):
        raise DataError(f"{refs_path} holds a {type(refs).__name__}; expected a list of refs as RefCOCO publishes it")
    instances = _Instances(refs_path.with_name("instances.json"))
    by_image: dict[Any, list[int]] = {}
    for i, ref in enumerate(refs):
        number = ref.get("image_id") if isinstance(ref, dict) else None
        if not isinstance(number, int) or number not in instances.images:
            found = f"a {type(ref).__name__}" if not isinstance(ref, dict) else f"image_id {shown(number)}"
            detail = f"{found}; expected a ref with an image_id of instances.json"
            yield from _lost(ref, Rejected("target", "unknown_image_id", detail), _source(refs_path, i))
        else:
            by_image.setdefault(number, []).append(i)
    for number, group in by_image.items():
        yield from _image(number, [(_source(refs_path, i), refs[i]) for i in group], instances)


def recognise_refcoco(annotations: Path) -> str | None:
    """Recognise the names of the files; no pickle is opened."""
    if annotations.is_dir():
        names = sorted(path.name for path in annotations.iterdir() if _REFS_NAME.fullmatch(path.name))
    else:
        names = [annotations.name] if _REFS_NAME.fullmatch(annotations.name) else []
    return f"RefCOCO's {' and '.join(names)}" if names else None


def _refs_path(annotations: Path) -> Path:
    if not annotations.is_dir():
        return annotations
    found = sorted(path for path in annotations.iterdir() if _REFS_NAME.fullmatch(path.name))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(f"{annotations} has {names}; expected one refs(...).p. Name the file itself as --annotations.")
    return found[0]


def _with_id(entries: list[Any]) -> Iterator[dict[str, Any]]:
    return (entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), int))


def _source(refs_path: Path, index: int) -> str:
    return f"{refs_path.name}[{index}]"


def _image(number: int, refs: list[tuple[str, dict[str, Any]]], instances: _Instances) -> Iterator[Candidate | Problem]:
    """Yield the candidate of an image, or the problems of its refs if the image has no usable name."""
    file_name, size = instances.images[number]
    problems: list[Problem] = []
    targets: list[Target] = []
    try:
        check_text(file_name, "target")
        image = image_path(file_name, '"file_name"')
    except Rejected as rejected:
        for source, ref in refs:
            yield from _lost(ref, rejected, source)
        return
    for source, ref in refs:
        try:
            _check_same_image(ref, image)
            box = _box(ref, instances)
            for i, sentence in enumerate(_sentences(ref)):
                _add_sentence(sentence, box, f"{source} sentences[{i}]", targets, problems)
        except Rejected as rejected:
            problems += _lost(ref, rejected, source)
    yield Candidate(
        image=image,
        key=None,
        source=refs[0][0],
        targets=tuple(targets),
        stated_size_px=size,
        problems=tuple(problems),
    )


def _check_same_image(ref: dict[str, Any], file_name: str) -> None:
    """Raise Rejected if the ref names another image, as in COCO_train2014_000000000005_0.jpg (with its own number)."""
    name = ref.get("file_name")
    if isinstance(name, str) and _stem(file_name) not in (_stem(name), re.sub(r"_\d+$", "", _stem(name))):
        detail = f"the ref is for {shown(name)}, image_id {ref['image_id']} of instances.json is {shown(file_name)}"
        raise Rejected("target", "other_image", detail)


def _stem(name: str) -> str:
    return PurePosixPath(name).stem


def _box(ref: dict[str, Any], instances: _Instances) -> Box:
    number = ref.get("ann_id")
    if not isinstance(number, int) or number not in instances.boxes:
        raise Rejected("target", "unknown_ann_id", f"ann_id {shown(number)} is not in instances.json")
    x, y, width, height = four_numbers(instances.boxes[number], "[x, y, width, height]")
    return x, y, x + width, y + height


def _sentences(ref: dict[str, Any]) -> list[Any]:
    sentences = ref.get("sentences")
    if not isinstance(sentences, list) or not sentences:
        raise Rejected("target", "bad_field", f'"sentences" is {shown(sentences)}; expected a non-empty list')
    return sentences


def _add_sentence(sentence: Any, box: Box, source: str, targets: list[Target], problems: list[Problem]) -> None:
    try:
        fields = sentence if isinstance(sentence, dict) else {}
        text = fields.get("sent") or fields.get("raw")
        if not isinstance(text, str):
            raise Rejected("target", "bad_field", f'"sent" is {shown(text)}; expected a string')
        targets.append(make_target(text, [box], num_boxes_found=1))
    except Rejected as rejected:
        problems.append(rejected.problem(source))


def _lost(ref: Any, rejected: Rejected, source: str) -> list[Problem]:
    """Return a problem for every sentence of a ref, each of which would have been a target."""
    sentences = ref.get("sentences") if isinstance(ref, dict) else None
    count = len(sentences) if isinstance(sentences, list) and sentences else 1
    return [Problem("target", rejected.reason, rejected.detail, source)] * count
