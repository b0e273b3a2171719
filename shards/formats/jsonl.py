"""JSON lines, or one JSON array of the same objects: one image each.

{"image": "a.jpg", "targets": [{"phrase": "dog", "boxes": [[1, 2, 30, 40]]}], "turns": [{"prompt": "?", "answer": "."}]}

or one question each, with the answer as CogVLM writes it:

{"image": "a.jpg", "Prompt": "狗在哪里?", "Label": "图片中存在一只狗,所在区域为[[086,540,400,760]]"}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cogvlm_ft.data.record import PIXELS_XYXY, other_form
from cogvlm_ft.grounding.targets import Box, Target, Turn
from cogvlm_ft.shards.formats.conversations import checked_pair, checked_turn
from cogvlm_ft.shards.formats.rows import first_objects, merge_same_image, rows_by_image, stated_size
from cogvlm_ft.shards.packing.candidates import (
    Candidate,
    Problem,
    Rejected,
    four_numbers,
    image_path,
    make_target,
    require,
)
from cogvlm_ft.shards.packing.given_splits import split_of_folder


def read_jsonl(path: Path, images_dir: Path) -> Iterator[Candidate | Problem]:
    """Yield one candidate per line, or one per image for Prompt/Label pairs. Raises DataError if no line is usable."""
    expected = 'one JSON object with "image" and "targets" or "turns" (or "Prompt" and "Label") per line'
    for rows in rows_by_image(path, _joined_image, expected=expected, arrays=True):
        if isinstance(rows, Problem):
            yield rows
            continue
        try:
            yield merge_same_image([_candidate(row.value, row.source) for row in rows])
        except Rejected as rejected:
            yield rejected.problem(rows[0].source)


def recognise_jsonl(annotations: Path) -> str | None:
    """Recognise lines with "image" and "targets", "turns" or "Prompt" and "Label"."""
    for line in first_objects(annotations):
        if "image" in line and ("targets" in line or "turns" in line):
            return 'JSON lines with "image" and "targets" or "turns"'
        if _is_pair(line):
            return 'JSON lines with "Prompt" and "Label"'
    return None


def _joined_image(line: dict[str, Any]) -> str | None:
    """Return the image of a Prompt/Label pair: several lines may share it. Other lines are complete alone."""
    image = image_path(_image(line), '"image"')
    return image if _is_pair(line) and "key" not in line else None


def _is_pair(line: dict[str, Any]) -> bool:
    """Return whether the row is one question and its answer: Prompt and Label, in any letter case."""
    return "targets" not in line and "turns" not in line and {"prompt", "label"} <= {name.lower() for name in line}


def _image(line: dict[str, Any]) -> Any:
    if "image" in line:
        return line["image"]
    return next((value for name, value in line.items() if name.lower() in ("image", "image_path")), None)


def _candidate(line: dict[str, Any], source: str) -> Candidate:
    key = line.get("key")
    good_key = key is None or (isinstance(key, str) and bool(key.strip()))
    require(good_key, "sample", '"key"', key, "a string that is not empty")
    form = other_form(line, of_image=True) if line.get("targets") else None
    require(form is None, "sample", f'"{form}"', line.get(str(form)), PIXELS_XYXY)
    for name in ("targets", "turns"):
        require(isinstance(line.get(name, []), list), "sample", f'"{name}"', line.get(name), "a list")
    problems: list[Problem] = []
    targets = [_target(value, f"{source} targets[{i}]", problems) for i, value in enumerate(line.get("targets", []))]
    turns = [_turn(value, f"{source} turns[{i}]", problems) for i, value in enumerate(line.get("turns", []))]
    if _is_pair(line):
        turns = [_pair(line, source, problems)]
    return Candidate(
        image=image_path(_image(line), '"image"'),
        key=key,
        source=source,
        targets=tuple(target for target in targets if target),
        turns=tuple(turn for turn in turns if turn),
        stated_size_px=stated_size(line),
        unit_basis="documented",
        written_as="corners",
        problems=tuple(problems),
        split=split_of_folder(line["split"]) if isinstance(line.get("split"), str) else None,
    )


def _target(value: Any, source: str, problems: list[Problem]) -> Target | None:
    try:
        require(isinstance(value, dict), "target", "the target", value, 'an object with "phrase" and "boxes"')
        require(
            not {"boxes", "boxes_xyxy"} <= value.keys(), "target", "the target", value, "boxes or boxes_xyxy, not both"
        )
        form = other_form(value, of_image=False)
        require(form is None, "target", f'"{form}"', value.get(str(form)), PIXELS_XYXY)
        name = "boxes_xyxy" if "boxes_xyxy" in value else "boxes"
        raw_boxes = value.get(name)
        expected = "a list of boxes (empty = absent from the image)"
        require(isinstance(raw_boxes, list), "target", f'"{name}"', raw_boxes, expected)
        language, description = value.get("language"), value.get("description")
        require(language in (None, "zh", "en"), "target", '"language"', language, '"zh" or "en"')
        require(description is None or isinstance(description, str), "target", '"description"', description, "a string")
        return make_target(
            value.get("phrase"),
            _boxes(raw_boxes, f"{source}.{name}", problems),
            num_boxes_found=len(raw_boxes),
            language=language,
            description=description,
        )
    except Rejected as rejected:
        problems.append(rejected.problem(source))
        return None


def _boxes(raw_boxes: list[Any], source: str, problems: list[Problem]) -> list[Box]:
    boxes = []
    for i, box in enumerate(raw_boxes):
        try:
            boxes.append(four_numbers(box, "[x0, y0, x1, y1]"))
        except Rejected as rejected:
            problems.append(rejected.problem(f"{source}[{i}]"))
    return boxes


def _turn(value: Any, source: str, problems: list[Problem]) -> Turn | None:
    try:
        require(isinstance(value, dict), "turn", "the turn", value, 'an object with "prompt" and "answer"')
        for name in ("prompt", "answer"):
            text = value.get(name)
            require(
                isinstance(text, str) and bool(text.strip()), "turn", f'"{name}"', text, "a string that is not empty"
            )
        history = value.get("history") or []
        require(isinstance(history, list), "turn", '"history"', history, "a list of [prompt, answer]")
        for pair in history:
            good = (
                isinstance(pair, list)
                and len(pair) == 2
                and all(isinstance(text, str) and text.strip() for text in pair)
            )
            require(good, "turn", '"history"', pair, "a list of [prompt, answer], none empty")
        notes: list[Problem] = []
        earlier = tuple(checked_pair(pair[0], pair[1], source, notes) for pair in history)
        turn = Turn(*checked_pair(value["prompt"], value["answer"], source, notes), history=earlier)
        problems += notes
        return turn
    except Rejected as rejected:
        problems.append(rejected.problem(source))
        return None


def _pair(line: dict[str, Any], source: str, problems: list[Problem]) -> Turn | None:
    """Return a Prompt/Label pair."""
    try:
        texts = []
        for expected in ("prompt", "label"):
            names = [name for name in line if name.lower() == expected]
            require(len(names) == 1, "turn", "the keys", names, f'"{expected.capitalize()}" only once')
            require(isinstance(line[names[0]], str), "turn", f'"{names[0]}"', line[names[0]], "a string")
            texts.append(line[names[0]])
        return checked_turn(texts[0], texts[1], (), source, problems)
    except Rejected as rejected:
        problems.append(rejected.problem(source))
        return None
