"""Conversations with boxes as ms-swift, Qwen, InternVL and LLaVA write them: JSON lines, or one JSON array.

{"messages": [{"role": "user", "content": "<image>Find <ref-object>"}, {"role": "assistant", "content": "<bbox>"}],
 "images": ["a.jpg"], "objects": {"ref": ["the dog"], "bbox": [[1, 2, 30, 40]], "bbox_type": "real"}}
{"query": "<img>a.jpg</img>Find <ref>the dog</ref>", "response": "<box>(25,66),(750,999)</box>"}
{"instruction": "<image>What is it?", "input": "", "output": "A dog.", "images": ["a.jpg"]}
{"image": "a.jpg",
 "conversations": [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A dog."}]}

Phrases with boxes become targets, text without boxes is kept. Boxes without a phrase become problems. The marks of
phrases and boxes are in marked_text.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cogvlm_ft.grounding.targets import Target, Turn
from cogvlm_ft.shards.formats.box_text import normalise_box_text
from cogvlm_ft.shards.formats.conversations import Message, checked_turn, questions_and_answers
from cogvlm_ft.shards.formats.marked_text import (
    IMAGE_TAG,
    MarkedText,
    Objects,
    Phrase,
    Region,
    list_in,
    read_answer,
    read_marked_text,
)
from cogvlm_ft.shards.formats.rows import first_objects, merge_same_image, rows_by_image
from cogvlm_ft.shards.packing.candidates import (
    Candidate,
    Problem,
    Rejected,
    UnitBasis,
    Units,
    four_numbers,
    image_path,
    make_target,
    require,
)

_CONVERSATIONS = '"messages", "conversations", "query" and "response" or "instruction" and "output"'


def read_swift(annotations: Path, images_dir: Path) -> Iterator[Candidate | Problem]:
    """Yield one candidate per image. An unreadable row becomes a problem; raises DataError if all are."""
    expected = f"one JSON object with {_CONVERSATIONS}, and one image per line"
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
    """Recognise objects with one of the kinds of conversation."""
    for row in first_objects(annotations):
        for name in ("messages", "conversations"):
            if isinstance(row.get(name), list):
                return f'ms-swift / Qwen conversations in "{name}"'
        if "query" in row and "response" in row:
            return 'ms-swift / Qwen conversations in "query" and "response"'
        if "instruction" in row and "output" in row and ("images" in row or "image" in row):
            return 'LLaMA-Factory pairs in "instruction" and "output"'
    return None


def _candidate(row: dict[str, Any], source: str) -> Candidate:
    problems: list[Problem] = []
    objects = Objects(row.get("objects"))
    pairs = questions_and_answers(_messages(row), source, problems)
    texts = [(read_marked_text(question, objects), read_answer(answer, objects)) for question, answer in pairs]
    objects.check_all_used()
    units, unit_basis = _units([region for pair in texts for text in pair for region in text.regions])
    regions_of: dict[str, list[Region]] = {}
    turns: list[Turn] = []
    earlier: tuple[tuple[str, str], ...] = ()
    for question, answer in texts:
        try:
            if question.regions or answer.regions or answer.entries is not None:
                for phrase, regions in _phrases_with_boxes(question, answer):
                    regions_of.setdefault(phrase.text, []).extend(regions)
            else:
                turn = checked_turn(question.plain, answer.plain, earlier, source, problems)
                turns.append(turn)
                earlier = (*earlier, (turn.prompt, turn.answer))
        except Rejected as rejected:
            problems.append(rejected.problem(source))
    return Candidate(
        image=_image(row),
        key=None,
        source=source,
        targets=tuple(_targets(regions_of, source, problems)),
        turns=tuple(turns),
        stated_size_px=objects.size_px if units == "pixels" else None,
        units=units,
        unit_basis=unit_basis,
        written_as="corners",
        problems=tuple(problems),
    )


def _units(regions: list[Region]) -> tuple[Units, UnitBasis]:
    """Return the one unit of the boxes of a row; raises Rejected if there are several."""
    found = {region.units for region in regions}
    if len(found) > 1:
        raise Rejected("sample", "mixed_units", f"boxes of the row are in {' and '.join(sorted(found))}")
    bases = {region.unit_basis for region in regions}
    basis: UnitBasis = next((basis for basis in ("unknown", "documented") if basis in bases), "stated")
    return (found.pop() if found else "pixels"), basis


def _phrases_with_boxes(question: MarkedText, answer: MarkedText) -> list[tuple[Phrase, list[Region]]]:
    """Return which boxes belong to which phrase; raises Rejected if that is ambiguous."""
    normalise_box_text(_without_request(question.plain, answer), "the question", is_prompt=True)
    normalise_box_text(answer.plain, "the answer", is_prompt=False)
    if question.regions and answer.regions:
        raise _not_clear("boxes in question and answer")
    if answer.entries is not None:
        return _labelled(question, answer.entries)
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
    found: list[tuple[Phrase, list[Region]]] = []
    for part in answer.parts:
        if isinstance(part, Phrase):
            found.append((part, []))
        elif found:
            found[-1][1].append(part)
        else:
            raise _not_clear("a box before the first phrase of the answer")
    return [(phrase, regions) for phrase, regions in found if regions]


def _labelled(
    question: MarkedText, entries: tuple[tuple[Phrase | None, tuple[Region, ...]], ...]
) -> list[tuple[Phrase, list[Region]]]:
    """Return the boxes of JSON by label, or by the one marked phrase of the question."""
    asked = question.phrases[0] if len(question.phrases) == 1 else None
    if not entries:
        if asked is None:
            raise _not_clear("an empty list of boxes for a question without one marked phrase")
        return [(asked, [])]
    found = [(label or asked, list(regions)) for label, regions in entries]
    named = [(phrase, regions) for phrase, regions in found if phrase]
    if len(named) < len(found):
        raise _not_clear("a box in JSON without a label")
    return named


def _without_request(question: str, answer: MarkedText) -> str:
    """Return a question without the names of JSON fields: it may ask for the form in which the answer is."""
    return question if answer.entries is None else question.replace('"bbox_2d"', "").replace('"bbox"', "")


def _not_clear(found: str) -> Rejected:
    expected = "expected <ref-object><bbox> or <ref>the phrase</ref><box>(x0,y0),(x1,y1)</box>"
    return Rejected("turn", "boxes_without_phrase", f"{found}: it is not clear what they are boxes of; {expected}")


def _targets(regions_of: dict[str, list[Region]], source: str, problems: list[Problem]) -> Iterator[Target]:
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


def _messages(row: dict[str, Any]) -> list[Message]:
    for name in ("messages", "conversations"):
        if name in row:
            messages = list_in(row, name)
            for message in messages:
                require(isinstance(message, dict), "sample", f'"{name}"', message, "objects with a speaker and a text")
            return [
                (message.get("role", message.get("from")), _joined(message.get("content", message.get("value"))))
                for message in messages
            ]
    history = list_in(row, "history")
    for pair in history:
        require(isinstance(pair, list) and len(pair) == 2, "sample", '"history"', pair, "[question, answer]")
    pairs = [*history, _alpaca_pair(row) if "instruction" in row else [row.get("query"), row.get("response")]]
    return [message for question, answer in pairs for message in (("user", question), ("assistant", answer))]


def _joined(content: Any) -> Any:
    """Return one text for a content of parts, with <image> for its images; anything else as it is."""
    texts = [_text_of_part(part) for part in content] if isinstance(content, list) else [None]
    return content if None in texts else "".join(map(str, texts))


def _text_of_part(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("image", "image_url"):
        return "<image>"
    return part["text"] if kind == "text" and isinstance(part.get("text"), str) else None


def _images_of_parts(row: dict[str, Any]) -> list[Any]:
    """Return the images that parts of contents name: {"type": "image", "image": "a.jpg"}, or an address."""
    contents = [
        message.get("content", message.get("value")) for message in row.get("messages", row.get("conversations", []))
    ]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    found = [part[name] for part in parts for name in ("image", "image_url", "path") if name in part]
    return [image.get("url") if isinstance(image, dict) else image for image in found]


def _alpaca_pair(row: dict[str, Any]) -> list[Any]:
    """Return the question and the answer of a row of LLaMA-Factory."""
    parts = [row.get("instruction"), row.get("input") or ""]
    for part in parts:
        require(isinstance(part, str), "sample", '"instruction" or "input"', part, "a string")
    return ["\n".join(part for part in parts if part), row.get("output")]


def _image(row: dict[str, Any]) -> str:
    """Return the one image of a row."""
    texts = [text for _, text in _messages(row) if isinstance(text, str)]
    require(bool(texts), "sample", "the row", row, f"texts in {_CONVERSATIONS}")
    found = row.get("images", row.get("image"))
    images = [] if found is None else list(found) if isinstance(found, list) else [found]
    images += [image for image in _images_of_parts(row) if image not in images]
    images += dict.fromkeys(path.strip() for text in texts for path in IMAGE_TAG.findall(text))
    num_marks = sum(text.count("<image>") for text in texts)
    others = [name for name in ("videos", "audios") if row.get(name)]
    if len(images) > 1 or num_marks > 1 or others:
        detail = f"{len(images)} images, <image> {num_marks} times{''.join(f', {name}' for name in others)}"
        raise Rejected("sample", "several_images", f"{detail}; expected one image per conversation")
    image = images[0] if images else None
    return image_path(image.get("path") if isinstance(image, dict) else image, "the image")
