"""RefCOCO, RefCOCO+ and RefCOCOg as published: refs(unc).p, refs(google).p or refs(umd).p next to instances.json.

Also gRefCOCO's grefs(unc).json, where "ann_id" is a list of several boxes, or [-1] with "no_target" for an absent one.

refs: [{"ref_id": 0, "ann_id": 7, "image_id": 5, "file_name": "COCO_train2014_000000000005_0.jpg",
        "sentences": [{"sent": "the red car", ...}, ...], "split": "train", ...}, ...]
Their split is kept; testA and testB are test. Where the refs of one photo state several, as those of refs(google).p
may, it is in test or else in val, so that no photo is in two splits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Box, Target
from cogvlm_ft.shards.formats.plain_pickle import load_plain_pickle
from cogvlm_ft.shards.formats.rows import load_json, load_lists, stated_size
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
from cogvlm_ft.shards.packing.splits import SPLITS

_REFS_NAME = re.compile(r"refs\(\w+\)\.p|grefs\(\w+\)\.json")
_NO_TARGET = -1
_SPLITS = {"train": "train", "val": "val", "test": "test", "testA": "test", "testB": "test", "testC": "test"}


class _Instances:
    """The content of instances.json by id. Unusable entries are missing; only refs that need them are lost."""

    def __init__(self, path: Path) -> None:
        content = load_lists(path, "the instances.json that RefCOCO publishes beside its refs")
        self.annotations = {entry.get("id"): entry for entry in _with_id(content["annotations"])}
        self.images = {
            entry.get("id"): (entry.get("file_name"), stated_size(entry)) for entry in _with_id(content["images"])
        }


def read_refcoco(annotations: Path, images_dir: Path) -> Iterator[Candidate | Problem]:
    """Yield one candidate per image, one target per sentence. annotations: the folder, or its refs file."""
    refs_path = _refs_path(annotations)
    is_json = refs_path.suffix.lower() == ".json"
    refs = load_json(refs_path, "gRefCOCO's refs") if is_json else load_plain_pickle(refs_path)
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
    if not names:
        return None
    return f"{'gRefCOCO' if names[0].startswith('g') else 'RefCOCO'}'s {' and '.join(names)}"


def _refs_path(annotations: Path) -> Path:
    if not annotations.is_dir():
        return annotations
    found = sorted(path for path in annotations.iterdir() if _REFS_NAME.fullmatch(path.name))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        expected = "one refs(...).p or grefs(...).json. Name the file itself as --annotations."
        raise DataError(f"{annotations} has {names}; expected {expected}")
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
    split = _split(refs, problems)
    for source, ref in refs:
        try:
            _check_same_image(ref, image)
            boxes = _boxes(ref, instances)
            for i, sentence in enumerate(_sentences(ref)):
                _add_sentence(sentence, boxes, f"{source} sentences[{i}]", targets, problems)
        except Rejected as rejected:
            problems += _lost(ref, rejected, source)
    yield Candidate(
        image=image,
        key=None,
        source=refs[0][0],
        targets=tuple(_without_contradictions(targets, refs[0][0], problems)),
        stated_size_px=size,
        written_as="sizes",
        problems=tuple(problems),
        split=split,
    )


def _split(refs: list[tuple[str, dict[str, Any]]], problems: list[Problem]) -> str | None:
    """Return the split that the refs of a photo state; adds a note if they state several."""
    stated = (ref.get("split") for _, ref in refs)
    found = {_SPLITS[split] for split in stated if isinstance(split, str) and split in _SPLITS}
    if not found:
        return None
    split = max(found, key=SPLITS.index)
    if len(found) > 1:
        names = " and ".join(sorted(found, key=SPLITS.index))
        problems.append(Problem("note", f"moved_to_{split}", f"its refs are in {names}: all are {split}", refs[0][0]))
    return split


def _check_same_image(ref: dict[str, Any], file_name: str) -> None:
    """Raise Rejected if the ref names another image, as in COCO_train2014_000000000005_0.jpg (with its own number)."""
    name = ref.get("file_name")
    if isinstance(name, str) and _stem(file_name) not in (_stem(name), re.sub(r"_\d+$", "", _stem(name))):
        detail = f"the ref is for {shown(name)}, image_id {ref['image_id']} of instances.json is {shown(file_name)}"
        raise Rejected("target", "other_image", detail)


def _stem(name: str) -> str:
    return PurePosixPath(name).stem


def _boxes(ref: dict[str, Any], instances: _Instances) -> list[Box]:
    """Return the boxes of the ref, none for an absent target. Raises Rejected if one of them is unusable."""
    numbers = ref.get("ann_id")
    numbers = numbers if isinstance(numbers, list) else [numbers]
    is_absent = numbers == [_NO_TARGET]
    if "no_target" in ref and bool(ref["no_target"]) != (is_absent or numbers == []):
        detail = f'"no_target" is {shown(ref["no_target"])}, "ann_id" is {shown(numbers)}'
        raise Rejected("target", "contradiction", f"{detail}; expected that both state the same")
    if is_absent or (numbers == [] and ref.get("no_target")):
        return []
    if not numbers:
        raise Rejected("target", "unknown_ann_id", '"ann_id" is empty; expected [-1] and "no_target" if it is absent')
    return [_box(number, ref["image_id"], instances) for number in numbers]


def _box(number: Any, image_id: int, instances: _Instances) -> Box:
    if not isinstance(number, int) or number not in instances.annotations:
        raise Rejected("target", "unknown_ann_id", f"ann_id {shown(number)} is not in instances.json")
    annotation = instances.annotations[number]
    if annotation.get("image_id", image_id) != image_id:
        detail = (
            f"ann_id {number} is of image_id {shown(annotation['image_id'])} in instances.json, the ref of {image_id}"
        )
        raise Rejected("target", "other_image", f"{detail}; expected one image. Take both files from one source.")
    try:
        x, y, width, height = four_numbers(annotation.get("bbox"), "[x, y, width, height]")
    except Rejected as rejected:
        raise Rejected("target", rejected.reason, rejected.detail) from None
    return x, y, x + width, y + height


def _sentences(ref: dict[str, Any]) -> list[Any]:
    sentences = ref.get("sentences")
    if not isinstance(sentences, list) or not sentences:
        raise Rejected("target", "bad_field", f'"sentences" is {shown(sentences)}; expected a non-empty list')
    return sentences


def _without_contradictions(targets: list[Target], source: str, problems: list[Problem]) -> Iterator[Target]:
    """Yield the targets, except absent ones whose phrase another ref of the photo has boxes for."""
    present = {target.phrase for target in targets if target.boxes_xyxy}
    for target in targets:
        if target.boxes_xyxy or target.phrase not in present:
            yield target
        else:
            detail = f"{shown(target.phrase)} is absent here, and has boxes in another ref of this photo"
            problems.append(Problem("target", "contradiction", detail, source))


def _add_sentence(sentence: Any, boxes: list[Box], source: str, targets: list[Target], problems: list[Problem]) -> None:
    try:
        fields = sentence if isinstance(sentence, dict) else {}
        text = fields.get("sent") or fields.get("raw")
        if not isinstance(text, str):
            raise Rejected("target", "bad_field", f'"sent" is {shown(text)}; expected a string')
        targets.append(make_target(text, boxes, num_boxes_found=len(boxes)))
    except Rejected as rejected:
        problems.append(rejected.problem(source))


def _lost(ref: Any, rejected: Rejected, source: str) -> list[Problem]:
    """Return a problem for every sentence of a ref, each of which would have been a target."""
    sentences = ref.get("sentences") if isinstance(ref, dict) else None
    count = len(sentences) if isinstance(sentences, list) and sentences else 1
    return [Problem("target", rejected.reason, rejected.detail, source)] * count
