"""Texts with phrases and boxes, as ms-swift, Qwen and InternVL mark them.

<ref>the dog</ref><box>(25,66),(750,999)</box>                             Qwen-VL, in thousandths
<ref>the dog</ref><box>[[25, 66, 750, 999]]</box>                          InternVL, in thousandths
<|object_ref_start|>dog<|object_ref_end|><|box_start|>(2,6),(7,9)<|box_end|>   Qwen2-VL; later versions in pixels
[{"bbox_2d": [25, 66, 750, 999], "label": "the dog"}]                      Qwen2.5-VL in pixels, Qwen3-VL in thousandths
<ref-object><bbox> or [{"bbox_2d": <bbox>, "label": "<ref-object>"}]       ms-swift, with "objects" beside the text
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from cogvlm_ft.shards.packing.candidates import Rejected, UnitBasis, Units, check_text, require, shown

_UNITS: dict[str, tuple[Units, UnitBasis]] = {
    "real": ("pixels", "documented"),
    "norm1": ("unit", "stated"),
    "norm_1": ("unit", "stated"),
    "norm1000": ("thousandths", "stated"),
    "norm_1000": ("thousandths", "stated"),
}
IMAGE_TAG = re.compile(r"(?:Picture [0-9]{1,3}:\s*)?<img>([^<]*)</img>\n?")
_MARK = re.compile(
    r"(?P<ref_slot><ref-object>)|(?P<box_slot><bbox>)"
    r"|<ref>(?P<ref>[^<]*)</ref>|<\|object_ref_start\|>(?P<ref2>[^<]*)<\|object_ref_end\|>"
    r"|<box>(?P<box>[^<]*)</box>|<\|box_start\|>(?P<box2>[^<]*)<\|box_end\|>"
)
_NUMBER = r"\s*(-?[0-9]+(?:\.[0-9]+)?)\s*"
_POINTS = re.compile(rf"\s*\({_NUMBER},{_NUMBER}\)\s*(?:,\s*)?\({_NUMBER},{_NUMBER}\)\s*")
_IN_JSON = re.compile(r"\"bbox(?:_2d)?\"\s*:")
_SLOT = re.compile(r"\"<bbox>\"|<bbox>|<ref-object>")
_FENCE = re.compile(r"```(?:json)?")
_BOX_KEYS = ("bbox_2d", "bbox")
_LABEL_KEYS = ("label", "name", "category", "class", "phrase", "ref", "object")
_SIZE = ("width", "height")
_MAX_STARTS = 5  # of JSON in a text


@dataclass(frozen=True)
class Phrase:
    """A marked phrase."""

    text: str


@dataclass(frozen=True)
class Region:
    """A box as found, not checked, and its unit."""

    box: Any
    units: Units
    unit_basis: UnitBasis


@dataclass(frozen=True)
class MarkedText:
    """A message.

    parts: its phrases and boxes in order.
    plain: the text with its phrases, without boxes.
    entries: of an answer in JSON: the label of each entry, if any, and its boxes. None for other texts.
    """

    parts: tuple[Phrase | Region, ...]
    plain: str
    entries: tuple[tuple[Phrase | None, tuple[Region, ...]], ...] | None = None

    @property
    def phrases(self) -> list[Phrase]:
        """Return the marked phrases."""
        return [part for part in self.parts if isinstance(part, Phrase)]

    @property
    def regions(self) -> list[Region]:
        """Return the boxes."""
        return [part for part in self.parts if isinstance(part, Region)]


class Objects:
    """The values of the placeholders of a row, returned in order."""

    def __init__(self, value: Any) -> None:
        if isinstance(value, str):  # older files hold JSON in a string
            value = _loads(value)
        value = {} if value is None else value
        self.size_px: tuple[int, int] | None = None
        self.in_pairs = isinstance(value, list)
        if self.in_pairs:
            for one in value:
                require(isinstance(one, dict), "sample", '"objects"', one, 'objects with "caption" and "bbox"')
            self.refs = [one.get("caption") for one in value]
            self.boxes = [one.get("bbox") for one in value]
            types = {str(one.get("bbox_type", "real")) for one in value} or {"real"}
            numbers = [one.get("image", 0) for one in value]
        else:
            require(isinstance(value, dict), "sample", '"objects"', value, 'an object with "ref" and "bbox"')
            self.refs, self.boxes, numbers = (list_in(value, name) for name in ("ref", "bbox", "image_id"))
            types = {str(value.get("bbox_type") or "real")}
            self.size_px = _size_of_image(value)
        require(not any(numbers), "sample", '"image_id"', numbers, "one image per conversation")
        is_known = len(types) == 1 and types <= set(_UNITS)
        require(is_known, "sample", '"bbox_type"', sorted(types), f"one of {list(_UNITS)}")
        self.units, self.unit_basis = _UNITS[types.pop()]
        self.num_refs = self.num_boxes = 0

    def next_ref(self) -> Phrase:
        """Return the phrase for the next <ref-object>."""
        self.num_refs += 1
        if self.num_refs > len(self.refs):
            raise self._mismatch()
        text = self.refs[self.num_refs - 1]
        require(isinstance(text, str), "sample", '"ref"', text, "a string")
        return Phrase(text)

    def next_boxes(self) -> list[Region]:
        """Return the box or boxes for the next <bbox>."""
        self.num_boxes += 1
        if self.num_boxes > len(self.boxes):
            raise self._mismatch()
        box = self.boxes[self.num_boxes - 1]
        several = isinstance(box, list) and bool(box) and isinstance(box[0], list)
        return [Region(one, self.units, self.unit_basis) for one in (box if several else [box])]

    def check_all_used(self) -> None:
        """Raise Rejected if any phrase or box is left over: the placeholders are then ambiguous."""
        may_be_unused = self.in_pairs and self.num_refs + self.num_boxes > 0
        for num_used, values in ((self.num_refs, self.refs), (self.num_boxes, self.boxes)):
            if num_used != len(values) and not (may_be_unused and num_used == 0):
                raise self._mismatch()

    def _mismatch(self) -> Rejected:
        return Rejected(
            "sample",
            "placeholder_count",
            f'{self.num_refs} <ref-object> and {self.num_boxes} <bbox> in the text, {len(self.refs)} "ref" and '
            f'{len(self.boxes)} "bbox" in "objects"; expected as many; put <ref-object> where the phrase is',
        )


def read_marked_text(text: str, objects: Objects) -> MarkedText:
    """Return the phrases and boxes of a question, or of an answer that is not JSON."""
    parts: list[Phrase | Region] = []

    def spell_out(mark: re.Match[str]) -> str:
        kind, content = mark.lastgroup, mark[mark.lastgroup or 0]
        if kind in ("box", "box2"):
            basis: UnitBasis = "documented" if kind == "box" else "unknown"
            parts.extend(Region(box, "thousandths", basis) for box in _inline_boxes(content))
        elif kind == "box_slot":
            parts.extend(objects.next_boxes())
        else:
            phrase = objects.next_ref() if kind == "ref_slot" else Phrase(content)
            parts.append(phrase)
            return phrase.text
        return ""

    plain = _MARK.sub(spell_out, _without_images(text))
    return MarkedText(tuple(parts), plain.strip())


def read_answer(text: str, objects: Objects) -> MarkedText:
    """Return the phrases and boxes of an answer, also of one that has them in JSON."""
    if _FENCE.sub("", text).strip() == "[]":
        return MarkedText((), "", ())
    return _read_json_text(text, objects) if _IN_JSON.search(text) else read_marked_text(text, objects)


def _read_json_text(text: str, objects: Objects) -> MarkedText:
    """Return the entries of the JSON in an answer; a text whose JSON cannot be read has none, to be reported."""
    slots: list[list[Region]] = []

    def fill(slot: re.Match[str]) -> str:
        if slot[0] == "<ref-object>":
            return json.dumps(objects.next_ref().text)[1:-1]
        slots.append(objects.next_boxes())
        return f'{{"slot": {len(slots) - 1}}}'

    spelled = _SLOT.sub(fill, _without_images(text))
    value, rest = _first_json(spelled)
    values = [value] if isinstance(value, dict) else value
    if not isinstance(values, list) or not all(_is_entry(entry) for entry in values):
        return MarkedText((), text)
    entries = tuple((_label(entry), _regions(entry, slots)) for entry in values)
    parts = [part for label, regions in entries for part in ([label] if label else []) + list(regions)]
    return MarkedText(tuple(parts), _FENCE.sub("", rest).strip(), entries)


def _first_json(text: str) -> tuple[Any, str]:
    """Return the first JSON object or list of objects in the text, and the text around it."""
    starts = [match.start() for match in re.finditer(r"\[\s*\{|\{", text)][:_MAX_STARTS]
    for start in starts:
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        return value, text[:start] + text[end:]
    return None, text


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and sum(key in entry for key in _BOX_KEYS) == 1


def _label(entry: dict[str, Any]) -> Phrase | None:
    labels = [entry[key] for key in _LABEL_KEYS if key in entry]
    check_text(labels[:1], "turn")
    return Phrase(labels[0]) if labels and isinstance(labels[0], str) else None


def _regions(entry: dict[str, Any], slots: list[list[Region]]) -> tuple[Region, ...]:
    box = next(entry[key] for key in _BOX_KEYS if key in entry)
    if isinstance(box, dict) and isinstance(box.get("slot"), int) and 0 <= box["slot"] < len(slots):
        return tuple(slots[box["slot"]])
    boxes = box if isinstance(box, list) and box and isinstance(box[0], list) else [box]
    return tuple(Region(one, "thousandths", "unknown") for one in boxes)


def _inline_boxes(text: str) -> list[Any]:
    """Parse one box or a list of boxes; return any other text as it is, to be reported as an invalid box."""
    text = unicodedata.normalize("NFKC", text)
    points = _POINTS.fullmatch(text)
    if points:
        return [[float(number) for number in points.groups()]]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return [text]
    several = isinstance(value, list) and bool(value) and all(isinstance(box, list) for box in value)
    return value if several else [value]


def _size_of_image(objects: dict[str, Any]) -> tuple[int, int] | None:
    """Return "width" and "height" of the image for which the boxes were made, if they are stated."""
    sides = [found[0] if isinstance(found := objects.get(name), list) and found else found for name in _SIZE]
    width, height = (side if type(side) is int and side > 0 else 0 for side in sides)
    return (width, height) if width and height else None


def _without_images(text: str) -> str:
    return IMAGE_TAG.sub("", text).replace("<image>", "")


def list_in(value: dict[str, Any], name: str) -> list[Any]:
    """Return the list of this name, empty if there is none; raises Rejected if it is something else."""
    found = value.get(name)
    require(found is None or isinstance(found, list), "sample", f'"{name}"', found, "a list")
    return found or []


def _loads(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Rejected("sample", "bad_json", f'"objects": {error}: {shown(text)}') from None
    check_text(value, "sample")  # escapes may not be valid text
    return value
