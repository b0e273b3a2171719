"""The JSON of one sample: the targets of an image, their boxes, and turns written by the user."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from typing import Any

from cogvlm_ft.data.stored_photo import StoredTiles, stored_tiles_from_json
from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Box, Name, Target, Turn

BOX_TOLERANCE_PX = 1.0
"""How far a box may exceed the image and still be clipped: annotation tools round, and some count pixels from 1."""

_XYXY, _PIXELS = ("xyxy", "pascal_voc", "corners"), ("pixel", "pixels", "px", "real")
_FORMS = {
    **dict.fromkeys(("format", "mode", "box_format", "bbox_format", "box_mode", "bbox_mode"), (*_XYXY, *_PIXELS)),
    **dict.fromkeys(("unit", "units", "box_unit", "bbox_type"), _PIXELS),
}
"""Fields in which other programs describe their box format, and the values that match this package's format."""
_ABOUT_IMAGES = ("format", "mode")
PIXELS_XYXY = "boxes [x0, y0, x1, y1] in pixels. Convert them, or remove the field if they already are"

_MAX_NAMED = 8  # fields in a message

_CJK = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


class BadSampleError(DataError):
    """One sample cannot be used. `reason` is a word to count by, `detail` explains it."""

    def __init__(self, key: str, reason: str, detail: str) -> None:
        super().__init__(key, reason, detail)  # all three, so that the error survives pickling by a DataLoader worker
        self.key = key
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"sample {self.key!r}: {self.reason}: {self.detail}"


@dataclass(frozen=True)
class Record:
    """Content of the JSON of a sample.

    key: name of the sample, unique in its shard set.
    image_size_px: (width, height) of the image, or None while unknown (JSON written by other tools).
    source: the annotation it came from, for people.
    targets: what can be asked about.
    turns: prompt/answer pairs that the user wrote, used verbatim.
    upright: size and boxes refer to the image after applying its EXIF orientation.
    tiles: of a large photo, if they are stored; size and boxes are those of the photo.
    """

    key: str
    image_size_px: tuple[int, int] | None
    source: str
    targets: tuple[Target, ...]
    turns: tuple[Turn, ...]
    upright: bool = False
    tiles: StoredTiles | None = None


def record_to_json(record: Record) -> bytes:
    """Serialize to compact UTF-8 JSON; equal records always give equal bytes."""
    fields: dict[str, Any] = {
        "key": record.key,
        "image_size_px": record.image_size_px,
        "source": record.source,
        "targets": [_target_fields(target) for target in record.targets],
        "turns": [_turn_fields(turn) for turn in record.turns],
    }
    if record.upright:
        fields["upright"] = True
    if record.tiles is not None:
        fields["tiles"] = record.tiles.to_json()
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _target_fields(target: Target) -> dict[str, Any]:
    """Include the names only if there are some."""
    fields: dict[str, Any] = {
        "phrase": target.phrase,
        "language": target.language,
        "boxes_xyxy": target.boxes_xyxy,
        "description": target.description,
    }
    return fields | {"names": target.names} if target.names else fields


def _turn_fields(turn: Turn) -> dict[str, Any]:
    """Include the history only if there is one."""
    fields: dict[str, Any] = {"prompt": turn.prompt, "answer": turn.answer}
    return fields | {"history": turn.history} if turn.history else fields


def record_from_json(data: bytes, key: str) -> Record:
    """Parse a record written by this project or another tool; it must have targets or turns.

    Unknown fields are ignored. Raises BadSampleError with reason bad_json, bad_record (names the field) or no_targets.
    """
    try:
        fields = json.loads(data.decode("utf-8"))
        json.dumps(fields, ensure_ascii=False).encode()  # an escaped half of a surrogate pair is not text either
    except (ValueError, RecursionError) as error:
        raise BadSampleError(key, "bad_json", str(error)) from None
    _require(isinstance(fields, dict), key, "the record", fields, "a JSON object")
    source, upright = fields.get("source", ""), fields.get("upright", False)
    _check_form(fields, key, "", of_image=True)
    _require(isinstance(source, str), key, "source", source, "a string")
    _require(isinstance(upright, bool), key, "upright", upright, "true or false")
    targets = _list(fields.get("targets", []), key, "targets")
    turns = _list(fields.get("turns", []), key, "turns")
    if not targets and not turns:
        found = ", ".join(repr(name)[:40] for name in list(fields)[:_MAX_NAMED]) or "nothing"
        detail = f'the record: found {found}; expected "targets" or "turns" with at least one entry'
        if {"caption", "url"} <= fields.keys():
            detail += (
                ". These are captions as img2dataset downloads them, without boxes: annotate the images with boxes "
                "and write shards with shards/build.py"
            )
        raise BadSampleError(key, "no_targets", detail)
    return Record(
        key=key,
        image_size_px=_image_size(fields.get("image_size_px"), key),
        source=source,
        targets=tuple(_target(value, key, f"targets[{i}]") for i, value in enumerate(targets)),
        turns=tuple(_turn(value, key, f"turns[{i}]") for i, value in enumerate(turns)),
        upright=upright,
        tiles=_tiles(fields.get("tiles"), key),
    )


def other_form(fields: dict[str, Any], *, of_image: bool) -> str | None:
    """Return the field that states another form of the boxes than ours; of_image: of all targets of an image."""
    names = (name for name in _FORMS if name in fields and not (of_image and name in _ABOUT_IMAGES))
    return next((name for name in names if str(fields[name]).lower() not in _FORMS[name]), None)


def _check_form(fields: dict[str, Any], key: str, field: str, *, of_image: bool) -> None:
    name = other_form(fields, of_image=of_image)
    if name:
        raise BadSampleError(key, "bad_record", f"{field}{name}: found {fields[name]!r:.80}; expected {PIXELS_XYXY}")


def detect_language(text: str) -> str:
    """Return "zh" if the text has a Chinese character, else "en"."""
    return "zh" if _CJK.search(text) else "en"


def is_finite_number(value: object) -> bool:
    """Return True for an int or float within the range of float; False for bool, NaN and infinity."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def clip_box(box: Box, image_size_px: tuple[int, int]) -> Box:
    """Return the part of the box inside the image."""
    width, height = float(image_size_px[0]), float(image_size_px[1])
    x0, y0, x1, y1 = box
    return min(max(x0, 0.0), width), min(max(y0, 0.0), height), min(max(x1, 0.0), width), min(max(y1, 0.0), height)


def box_defect(box: Box, image_size_px: tuple[int, int]) -> str | None:
    """Return why a box cannot be used in an image of this size, as one word; None if it can after `clip_box`."""
    width, height = image_size_px
    x0, y0, x1, y1 = box
    if x0 > x1 or y0 > y1:
        return "inverted_box"
    if min(x0, y0) < -BOX_TOLERANCE_PX or x1 > width + BOX_TOLERANCE_PX or y1 > height + BOX_TOLERANCE_PX:
        return "box_outside_image"
    x0, y0, x1, y1 = clip_box(box, image_size_px)
    return None if x0 < x1 and y0 < y1 else "zero_area"


def _require(ok: bool, key: str, field: str, value: object, expected: str) -> None:
    if not ok:
        raise BadSampleError(key, "bad_record", f"{field}: found {value!r:.80}; expected {expected}")


def _list(value: Any, key: str, field: str) -> list[Any]:
    _require(isinstance(value, list), key, field, value, "a list")
    return value


def _text(value: Any, key: str, field: str) -> str:
    _require(isinstance(value, str) and bool(value.strip()), key, field, value, "a string that is not empty")
    return value


def _image_size(value: Any, key: str) -> tuple[int, int] | None:
    if value is None:
        return None
    numbers = _list(value, key, "image_size_px")
    good = len(numbers) == 2 and all(type(number) is int and number > 0 for number in numbers)
    _require(good, key, "image_size_px", value, "[width, height] in pixels")
    return numbers[0], numbers[1]


def _tiles(value: Any, key: str) -> StoredTiles | None:
    if value is None:
        return None
    try:
        return stored_tiles_from_json(value)
    except ValueError as error:
        raise BadSampleError(key, "bad_record", f"tiles: found {value!r:.80}; {error}") from None


def _target(value: Any, key: str, field: str) -> Target:
    _require(isinstance(value, dict), key, field, value, "an object")
    _check_form(value, key, f"{field}.", of_image=False)
    phrase = _text(value.get("phrase"), key, f"{field}.phrase")
    language = value.get("language", detect_language(phrase))
    _require(language in ("zh", "en"), key, f"{field}.language", language, '"zh" or "en"')
    description = value.get("description")
    _require(description is None or isinstance(description, str), key, f"{field}.description", description, "a string")
    boxes, names = _boxes(value, key, field), _names(value.get("names", []), key, f"{field}.names")
    return Target(phrase, language, boxes, description, names)


def _names(value: Any, key: str, field: str) -> tuple[Name, ...]:
    """Parse pairs of a language and words."""
    names = [_list(pair, key, f"{field}[{i}]") for i, pair in enumerate(_list(value, key, field))]
    for i, pair in enumerate(names):
        good = len(pair) == 2 and pair[0] in ("zh", "en")
        _require(good, key, f"{field}[{i}]", pair, '["zh" or "en", words]')
        _text(pair[1], key, f"{field}[{i}]")
    return tuple((language, words) for language, words in names)


def _boxes(target: dict[str, Any], key: str, field: str) -> tuple[Box, ...]:
    """Return the boxes of a target: `boxes_xyxy` as this project writes them, or `boxes` as people write them."""
    given = {name: target[name] for name in ("boxes_xyxy", "boxes") if target.get(name) is not None}
    expected = "a list of [x0, y0, x1, y1] in pixels, empty if the object is absent"
    missing = "boxes_xyxy" if "boxes_xyxy" in target else "boxes"
    _require(bool(given), key, f"{field}.{missing}", None, expected)
    (name, boxes), *other = given.items()
    _require(
        all(boxes == found for _, found in other),
        key,
        f"{field}.boxes",
        given.get("boxes"),
        f"{boxes}, as in boxes_xyxy",
    )
    _require(isinstance(boxes, list), key, f"{field}.{name}", boxes, expected)
    return tuple(_box(box, key, f"{field}.{name}[{i}]") for i, box in enumerate(boxes))


def _box(value: Any, key: str, field: str) -> Box:
    numbers = _list(value, key, field)
    good = len(numbers) == 4 and all(is_finite_number(number) for number in numbers)
    _require(good, key, field, value, "four finite numbers [x0, y0, x1, y1]")
    x0, y0, x1, y1 = (float(number) for number in numbers)
    return x0, y0, x1, y1


def _turn(value: Any, key: str, field: str) -> Turn:
    _require(isinstance(value, dict), key, field, value, "an object")
    history = _list(value.get("history") or [], key, f"{field}.history")
    return Turn(
        prompt=_text(value.get("prompt"), key, f"{field}.prompt"),
        answer=_text(value.get("answer"), key, f"{field}.answer"),
        history=tuple(_pair(pair, key, f"{field}.history[{i}]") for i, pair in enumerate(history)),
    )


def _pair(value: Any, key: str, field: str) -> tuple[str, str]:
    pair = _list(value, key, field)
    _require(len(pair) == 2, key, field, value, "[prompt, answer]")
    return _text(pair[0], key, f"{field}[0]"), _text(pair[1], key, f"{field}[1]")
