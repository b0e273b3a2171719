"""Conversations with boxes as ms-swift and Qwen write them: JSON lines, or one JSON array.

{"messages": [{"role": "user", "content": "<image>Find <ref-object>"}, {"role": "assistant", "content": "<bbox>"}],
 "images": ["a.jpg"], "objects": {"ref": ["the dog"], "bbox": [[1, 2, 30, 40]], "bbox_type": "real"}}
{"query": "<img>a.jpg</img>Find <ref>the dog</ref>", "response": "<box>(25,66),(750,999)</box>"}
{"image": "a.jpg",
 "conversations": [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A dog."}]}

Phrases with boxes become targets, text without boxes is kept unchanged. Boxes without a phrase become problems.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvlm_ft.grounding.targets import Target, Turn
from cogvlm_ft.shards.formats.box_text import check_box_text
from cogvlm_ft.shards.formats.conversations import Message, questions_and_answers, verbatim_turn
from cogvlm_ft.shards.formats.rows import first_objects, merge_same_image, rows_by_image
from cogvlm_ft.shards.packing.candidates import (
    Candidate,
    Problem,
    Rejected,
    Units,
    check_text,
    four_numbers,
    image_path,
    make_target,
    require,
    shown,
)

_UNITS: dict[str, Units] = {
    "real": "pixels",
    "norm1": "unit",
    "norm_1": "unit",
    "norm1000": "thousandths",
    "norm_1000": "thousandths",
}
_IMG = re.compile(r"(?:Picture [0-9]{1,3}:\s*)?<img>([^<]*)</img>\n?")
_MARK = re.compile(
    r"(?P<ref_slot><ref-object>)|(?P<box_slot><bbox>)"
    r"|<ref>(?P<ref>[^<]*)</ref>|<\|object_ref_start\|>(?P<ref2>[^<]*)<\|object_ref_end\|>"
    r"|<box>(?P<box>[^<]*)</box>|<\|box_start\|>(?P<box2>[^<]*)<\|box_end\|>"
)
_NUMBER = r"\s*(-?[0-9]+(?:\.[0-9]+)?)\s*"
_POINTS = re.compile(rf"\s*\({_NUMBER},{_NUMBER}\)\s*(?:,\s*)?\({_NUMBER},{_NUMBER}\)\s*")


@dataclass(frozen=True)
class _Phrase:
    text: str


@dataclass(frozen=True)
class _Region:
    box: Any  # as found, not checked
    is_inline: bool = False


@dataclass(frozen=True)
class _Text:
    """A message.

    parts: its phrases and boxes in order.
    plain: the text with its phrases, without boxes.
    """

    parts: tuple[_Phrase | _Region, ...]
    plain: str

    @property
    def phrases(self) -> list[_Phrase]:
        return [part for part in self.parts if isinstance(part, _Phrase)]

    @property
    def regions(self) -> list[_Region]:
        return [part for part in self.parts if isinstance(part, _Region)]


class _Objects:
    """The values of the placeholders of a row, returned in order."""

    def __init__(self, value: Any) -> None:
        if isinstance(value, str):  # older files hold JSON in a string
            value = _loads(value)
        value = {} if value is None else value
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
            self.refs, self.boxes, numbers = (_list(value, name) for name in ("ref", "bbox", "image_id"))
            types = {str(value.get("bbox_type") or "real")}
        require(not any(numbers), "sample", '"image_id"', numbers, "one image per conversation")
        is_known = len(types) == 1 and types <= set(_UNITS)
        require(is_known, "sample", '"bbox_type"', sorted(types), f"one of {list(_UNITS)}")
        self.units = _UNITS[types.pop()]
        self.num_refs = self.num_boxes = 0

    def next_ref(self) -> _Phrase:
        """Return the phrase for the next <ref-object>."""
        self.num_refs += 1
        if self.num_refs > len(self.refs):
            raise self._mismatch()
        text = self.refs[self.num_refs - 1]
        require(isinstance(text, str), "sample", '"ref"', text, "a string")
        return _Phrase(text)

    def next_boxes(self) -> list[_Region]:
        """Return the box or boxes for the next <bbox>."""
        self.num_boxes += 1
        if self.num_boxes > len(self.boxes):
            raise self._mismatch()
        box = self.boxes[self.num_boxes - 1]
        several = isinstance(box, list) and bool(box) and isinstance(box[0], list)
        return [_Region(one) for one in box] if several else [_Region(box)]

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


def read_swift(annotations: Path, images_dir: Path) -> Iterator[Candidate | Problem]:
    """Yield one candidate per image. An unreadable row becomes a problem; raises DataError if all are."""
    expected = 'one JSON object with "messages", "conversations" or "query" and "response", and one image per line'
    for rows in rows_by_image(annotations, _image, expected=expected, arrays=True):
        if isinstance(rows, Problem):
            yield rows
            continue
        candidates = []
        for row in rows:
            try:
                candidates.append(_candidate(row.value, row.source))
            except Rejected as rejected:
                yield rejected.problem(row.source)
        if candidates:
            yield merge_same_image(candidates)


def recognise_swift(annotations: Path) -> str | None:
    """Recognise objects with one of the three kinds of conversation."""
    for row in first_objects(annotations):
        for name in ("messages", "conversations"):
            if isinstance(row.get(name), list):
                return f'ms-swift / Qwen conversations in "{name}"'
        if "query" in row and "response" in row:
            return 'ms-swift / Qwen conversations in "query" and "response"'
    return None


def _candidate(row: dict[str, Any], source: str) -> Candidate:
    problems: list[Problem] = []
    objects = _Objects(row.get("objects"))
    pairs = questions_and_answers(_messages(row), source, problems)
    texts = [(_read_text(question, objects), _read_text(answer, objects)) for question, answer in pairs]
    objects.check_all_used()
    is_inline = any(region.is_inline for pair in texts for text in pair for region in text.regions)
    if is_inline and objects.num_boxes and objects.units != "thousandths":
        raise Rejected(
            "sample", "mixed_units", f'boxes of the text are in thousandths, of "objects" in {objects.units}'
        )
    regions_of: dict[str, list[_Region]] = {}
    turns: list[Turn] = []
    earlier: tuple[tuple[str, str], ...] = ()
    for question, answer in texts:
        try:
            check_box_text(question.plain, "the question", is_prompt=True)
            check_box_text(answer.plain, "the answer", is_prompt=False)
            if question.regions or answer.regions:
                for phrase, regions in _phrases_with_boxes(question, answer):
                    regions_of.setdefault(phrase.text, []).extend(regions)
            else:
                turns.append(verbatim_turn(question.plain, answer.plain, earlier))
                earlier = (*earlier, (question.plain, answer.plain))
        except Rejected as rejected:
            problems.append(rejected.problem(source))
    return Candidate(
        image=_image(row),
        key=None,
        source=source,
        targets=tuple(_targets(regions_of, source, problems)),
        turns=tuple(turns),
        units="thousandths" if is_inline else objects.units,
        problems=tuple(problems),
    )


def _phrases_with_boxes(question: _Text, answer: _Text) -> list[tuple[_Phrase, list[_Region]]]:
    """Return which boxes belong to which phrase; raises Rejected if that is ambiguous."""
    if question.regions and answer.regions:
        raise _not_clear("boxes in question and answer")
    if question.regions:
        if len(answer.phrases) != 1 or question.phrases:
            raise _not_clear("a box in the question, whose answer is not one marked phrase")
        return [(answer.phrases[0], question.regions)]
    if not answer.phrases:
        phrases = question.phrases
        if len(phrases) == 1:
            return [(phrases[0], answer.regions)]
        if phrases and len(phrases) == len(answer.regions):
            return [(phrase, [region]) for phrase, region in zip(phrases, answer.regions, strict=True)]
        raise _not_clear(f"{len(phrases)} marked phrases for {len(answer.regions)} boxes")
    found: list[tuple[_Phrase, list[_Region]]] = []
    for part in answer.parts:
        if isinstance(part, _Phrase):
            found.append((part, []))
        elif found:
            found[-1][1].append(part)
        else:
            raise _not_clear("a box before the first phrase of the answer")
    return [(phrase, regions) for phrase, regions in found if regions]


def _not_clear(found: str) -> Rejected:
    expected = "expected <ref-object><bbox> or <ref>the phrase</ref><box>(x0,y0),(x1,y1)</box>"
    return Rejected("turn", "boxes_without_phrase", f"{found}: it is not clear what they are boxes of; {expected}")


def _targets(regions_of: dict[str, list[_Region]], source: str, problems: list[Problem]) -> Iterator[Target]:
    for phrase, regions in regions_of.items():
        boxes = []
        for region in regions:
            try:
                boxes.append(four_numbers(region.box, "[x0, y0, x1, y1]"))
            except Rejected as rejected:
                problems.append(rejected.problem(source))
        try:
            yield make_target(phrase, boxes, num_boxes_found=len(regions))
        except Rejected as rejected:
            problems.append(rejected.problem(source))


def _read_text(text: str, objects: _Objects) -> _Text:
    parts: list[_Phrase | _Region] = []

    def spell_out(mark: re.Match[str]) -> str:
        kind, content = mark.lastgroup, mark[mark.lastgroup or 0]
        if kind in ("box", "box2"):
            parts.append(_Region(_inline_box(content), is_inline=True))
        elif kind == "box_slot":
            parts.extend(objects.next_boxes())
        else:
            phrase = objects.next_ref() if kind == "ref_slot" else _Phrase(content)
            parts.append(phrase)
            return phrase.text
        return ""

    plain = _MARK.sub(spell_out, _IMG.sub("", text).replace("<image>", ""))
    return _Text(tuple(parts), plain.strip())


def _inline_box(text: str) -> Any:
    """Parse four numbers; return any other text as it is, to be reported as an invalid box."""
    points = _POINTS.fullmatch(text)
    return [float(number) for number in points.groups()] if points else text


def _messages(row: dict[str, Any]) -> list[Message]:
    for name in ("messages", "conversations"):
        if name in row:
            messages = _list(row, name)
            for message in messages:
                require(isinstance(message, dict), "sample", f'"{name}"', message, "objects with a speaker and a text")
            return [
                (message.get("role", message.get("from")), message.get("content", message.get("value")))
                for message in messages
            ]
    history = _list(row, "history")
    for pair in history:
        require(isinstance(pair, list) and len(pair) == 2, "sample", '"history"', pair, "[question, answer]")
    pairs = [*history, [row.get("query"), row.get("response")]]
    return [message for question, answer in pairs for message in (("user", question), ("assistant", answer))]


def _image(row: dict[str, Any]) -> str:
    """Return the one image of a row."""
    texts = [text for _, text in _messages(row) if isinstance(text, str)]
    require(bool(texts), "sample", "the row", row, '"messages", "conversations" or "query" and "response"')
    found = row.get("images", row.get("image"))
    images = [] if found is None else list(found) if isinstance(found, list) else [found]
    images += dict.fromkeys(path.strip() for text in texts for path in _IMG.findall(text))
    num_marks = sum(text.count("<image>") for text in texts)
    others = [name for name in ("videos", "audios") if row.get(name)]
    if len(images) > 1 or num_marks > 1 or others:
        detail = f"{len(images)} images, <image> {num_marks} times{''.join(f', {name}' for name in others)}"
        raise Rejected("sample", "several_images", f"{detail}; expected one image per conversation")
    image = images[0] if images else None
    return image_path(image.get("path") if isinstance(image, dict) else image, "the image")


def _list(value: dict[str, Any], name: str) -> list[Any]:
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
