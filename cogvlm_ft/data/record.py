"""The JSON of one sample: what is asked about a picture, and where the answers are."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from typing import Any

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Box, Target, Turn

BOX_TOLERANCE_PX = 1.0
"""How far a box may leave the picture and still be clipped: annotation tools round, and some count pixels from 1."""

_CJK = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


class BadSampleError(DataError):
    """One sample cannot be used. `reason` is a short word to count by, `detail` is for people."""

    def __init__(self, key: str, reason: str, detail: str) -> None:
        super().__init__(key, reason, detail)  # all three, so that the error survives pickling by a DataLoader worker
        self.key = key
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"sample {self.key!r}: {self.reason}: {self.detail}"


@dataclass(frozen=True)
class Record:
    """What the JSON of a shard holds.

    key: name of the sample, unique in its shard set.
    image_size_px: (width, height) of the picture, or None while unknown (JSON written by others).
    source: the annotation it came from, for people.
    targets: what can be asked about.
    turns: prompt/answer pairs that the user wrote, used verbatim.
    upright: the size and the boxes are those of the picture turned as its EXIF orientation says.
    """

    key: str
    image_size_px: tuple[int, int] | None
    source: str
    targets: tuple[Target, ...]
    turns: tuple[Turn, ...]
    upright: bool = False


def record_to_json(record: Record) -> bytes:
    """Compact UTF-8 JSON; the same record always gives the same bytes."""
    fields: dict[str, Any] = {
        "key": record.key,
        "image_size_px": record.image_size_px,
        "source": record.source,
        "targets": [
            {
                "phrase": target.phrase,
                "language": target.language,
                "boxes_xyxy": target.boxes_xyxy,
                "description": target.description,
            }
            for target in record.targets
        ],
        "turns": [_turn_fields(turn) for turn in record.turns],
    }
    if record.upright:
        fields["upright"] = True
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _turn_fields(turn: Turn) -> dict[str, Any]:
    """The history only where there is one."""
    fields: dict[str, Any] = {"prompt": turn.prompt, "answer": turn.answer}
    return fields | {"history": turn.history} if turn.history else fields


def record_from_json(data: bytes, key: str) -> Record:
    """Read a record, ours or one written by others that has at least targets or turns; unknown fields are ignored.

    Raises BadSampleError with reason bad_json, bad_record (names the field) or no_targets.
    """
    try:
        fields = json.loads(data.decode("utf-8"))
        json.dumps(fields, ensure_ascii=False).encode()  # an escaped half of a surrogate pair is no text either
    except (ValueError, RecursionError) as error:
        raise BadSampleError(key, "bad_json", str(error)) from None
    _want(isinstance(fields, dict), key, "the record", fields, "a JSON object")
    source, upright = fields.get("source", ""), fields.get("upright", False)
    _want(isinstance(source, str), key, "source", source, "a string")
    _want(isinstance(upright, bool), key, "upright", upright, "true or false")
    targets = _list(fields.get("targets", []), key, "targets")
    turns = _list(fields.get("turns", []), key, "turns")
    if not targets and not turns:
        raise BadSampleError(key, "no_targets", 'the record has neither "targets" nor "turns"')
    return Record(
        key=key,
        image_size_px=_image_size(fields.get("image_size_px"), key),
        source=source,
        targets=tuple(_target(value, key, f"targets[{i}]") for i, value in enumerate(targets)),
        turns=tuple(_turn(value, key, f"turns[{i}]") for i, value in enumerate(turns)),
        upright=upright,
    )


def detect_language(text: str) -> str:
    """Chinese ("zh") if there is a Chinese character, else English ("en")."""
    return "zh" if _CJK.search(text) else "en"


def is_finite_number(value: object) -> bool:
    """True for an int or float that a float can hold; False for bool, NaN, infinity, and whole numbers beyond them."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def clip_box(box: Box, image_size_px: tuple[int, int]) -> Box:
    """The part of the box inside the picture."""
    width, height = float(image_size_px[0]), float(image_size_px[1])
    x0, y0, x1, y1 = box
    return min(max(x0, 0.0), width), min(max(y0, 0.0), height), min(max(x1, 0.0), width), min(max(y1, 0.0), height)


def box_defect(box: Box, image_size_px: tuple[int, int]) -> str | None:
    """Why this box cannot be used in a picture of this size, as a short word, or None if it can (after `clip_box`)."""
    width, height = image_size_px
    x0, y0, x1, y1 = box
    if x0 > x1 or y0 > y1:
        return "inverted_box"
    if min(x0, y0) < -BOX_TOLERANCE_PX or x1 > width + BOX_TOLERANCE_PX or y1 > height + BOX_TOLERANCE_PX:
        return "box_outside_image"
    x0, y0, x1, y1 = clip_box(box, image_size_px)
    return None if x0 < x1 and y0 < y1 else "zero_area"


def _want(ok: bool, key: str, field: str, value: object, wanted: str) -> None:
    if not ok:
        raise BadSampleError(key, "bad_record", f"{field} is {value!r:.80}, wanted {wanted}")


def _list(value: Any, key: str, field: str) -> list[Any]:
    _want(isinstance(value, list), key, field, value, "a list")
    return value


def _text(value: Any, key: str, field: str) -> str:
    _want(isinstance(value, str) and bool(value.strip()), key, field, value, "a string that is not empty")
    return value


def _image_size(value: Any, key: str) -> tuple[int, int] | None:
    if value is None:
        return None
    numbers = _list(value, key, "image_size_px")
    good = len(numbers) == 2 and all(type(number) is int and number > 0 for number in numbers)
    _want(good, key, "image_size_px", value, "[width, height] in pixels")
    return numbers[0], numbers[1]


def _target(value: Any, key: str, field: str) -> Target:
    _want(isinstance(value, dict), key, field, value, "an object")
    phrase = _text(value.get("phrase"), key, f"{field}.phrase")
    language = value.get("language", detect_language(phrase))
    _want(language in ("zh", "en"), key, f"{field}.language", language, '"zh" or "en"')
    description = value.get("description")
    _want(description is None or isinstance(description, str), key, f"{field}.description", description, "a string")
    boxes = _list(value.get("boxes_xyxy"), key, f"{field}.boxes_xyxy")
    return Target(
        phrase=phrase,
        language=language,
        boxes_xyxy=tuple(_box(box, key, f"{field}.boxes_xyxy[{i}]") for i, box in enumerate(boxes)),
        description=description,
    )


def _box(value: Any, key: str, field: str) -> Box:
    numbers = _list(value, key, field)
    good = len(numbers) == 4 and all(is_finite_number(number) for number in numbers)
    _want(good, key, field, value, "four finite numbers [x0, y0, x1, y1]")
    x0, y0, x1, y1 = (float(number) for number in numbers)
    return x0, y0, x1, y1


def _turn(value: Any, key: str, field: str) -> Turn:
    _want(isinstance(value, dict), key, field, value, "an object")
    history = _list(value.get("history") or [], key, f"{field}.history")
    return Turn(
        prompt=_text(value.get("prompt"), key, f"{field}.prompt"),
        answer=_text(value.get("answer"), key, f"{field}.answer"),
        history=tuple(_pair(pair, key, f"{field}.history[{i}]") for i, pair in enumerate(history)),
    )


def _pair(value: Any, key: str, field: str) -> tuple[str, str]:
    pair = _list(value, key, field)
    _want(len(pair) == 2, key, field, value, "[prompt, answer]")
    return _text(pair[0], key, f"{field}[0]"), _text(pair[1], key, f"{field}[1]")
