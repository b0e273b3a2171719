"""JSON lines: one image per line.

{"image": "a.jpg", "targets": [{"phrase": "dog", "boxes": [[1, 2, 30, 40]]}], "turns": [{"prompt": "?", "answer": "."}]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Box, Target, Turn
from shards.candidates import (
    Candidate,
    Problem,
    Rejected,
    check_text,
    four_numbers,
    image_path,
    make_target,
    want,
)


def read_jsonl(path: Path, images_dir: Path) -> Iterator[Candidate | Problem]:
    """One candidate per line. A line that cannot be used becomes a problem; DataError if no line can."""
    num_candidates = 0
    problems: list[Problem] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            source = f"{path.name}:{number}"
            try:
                yield _candidate(_parse_line(line), source)
                num_candidates += 1
            except Rejected as rejected:
                problems.append(rejected.problem(source))
                yield problems[-1]
    if not num_candidates:
        first = f"; first: {problems[0].detail}" if problems else ""
        wanted = 'wanted one JSON object with "image" and "targets" or "turns" per line'
        raise DataError(f"{path}: none of its {len(problems)} lines can be used, {wanted}{first}")


def _parse_line(line: bytes) -> Any:
    try:
        value = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise Rejected("sample", "bad_json", f"{error}: {line[:80]!r}") from None
    check_text(value, "sample")
    return value


def _candidate(line: Any, source: str) -> Candidate:
    want(isinstance(line, dict), "sample", "the line", line, 'a JSON object with "image"')
    image = image_path(line.get("image"), '"image"')
    key = line.get("key")
    good_key = key is None or (isinstance(key, str) and bool(key.strip()))
    want(good_key, "sample", '"key"', key, "a string that is not empty")
    for name in ("targets", "turns"):
        want(isinstance(line.get(name, []), list), "sample", f'"{name}"', line.get(name), "a list")
    problems: list[Problem] = []
    targets = [_target(value, f"{source} targets[{i}]", problems) for i, value in enumerate(line.get("targets", []))]
    turns = [_turn(value, f"{source} turns[{i}]", problems) for i, value in enumerate(line.get("turns", []))]
    return Candidate(
        image=image,
        key=key,
        source=source,
        targets=tuple(target for target in targets if target),
        turns=tuple(turn for turn in turns if turn),
        problems=tuple(problems),
    )


def _target(value: Any, source: str, problems: list[Problem]) -> Target | None:
    try:
        want(isinstance(value, dict), "target", "the target", value, 'an object with "phrase" and "boxes"')
        name = "boxes_xyxy" if "boxes_xyxy" in value else "boxes"
        raw_boxes = value.get(name)
        wanted = "a list of boxes (empty = not in the picture)"
        want(isinstance(raw_boxes, list), "target", f'"{name}"', raw_boxes, wanted)
        language, description = value.get("language"), value.get("description")
        want(language in (None, "zh", "en"), "target", '"language"', language, '"zh" or "en"')
        want(description is None or isinstance(description, str), "target", '"description"', description, "a string")
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
        want(isinstance(value, dict), "turn", "the turn", value, 'an object with "prompt" and "answer"')
        for name in ("prompt", "answer"):
            text = value.get(name)
            want(isinstance(text, str) and bool(text.strip()), "turn", f'"{name}"', text, "a string that is not empty")
        return Turn(value["prompt"], value["answer"])
    except Rejected as rejected:
        problems.append(rejected.problem(source))
        return None
