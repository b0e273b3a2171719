"""Rules for texts alone: language, counts, box text."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from cogvlm_ft.data.record import detect_language
from cogvlm_ft.grounding.boxes import parse_boxes
from cogvlm_ft.grounding.targets import Target, Turn
from cogvlm_ft.shards.formats.box_text import check_box_text
from cogvlm_ft.shards.packing.candidates import Rejected

_LATIN_WORD = re.compile(r"[A-Za-z\u00c0-\u024f]{2,}")
_KANA = re.compile("[\u3041-\u30ff]")
_MANY_LATIN_WORDS = 4
_OTHER_FORM = re.compile(r"\[\[|\]\]")

_EN_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_ZH_NUMBERS = {"一": 1, "二": 2, "两": 2, "三": 3, "四": 4, "五": 5, "六": 6, "七": 7, "八": 8, "九": 9, "十": 10}
_EN_COUNT = re.compile(
    r"(?:there (?:is|are) |(?:the |this )?(?:image|photo|picture) (?:shows|contains|has) )?"
    r"(?:exactly |only |a total of )?"
    rf"(?P<number>{'|'.join(_EN_NUMBERS)}|[1-9][0-9]?) (?!of\b|o'clock|years?\b|percent|am\b|pm\b|and a half)[a-z]",
    re.IGNORECASE,
)
_ZH_COUNT = re.compile(
    r"(?:(?:图片|图像|图|照片|画面)中?(?:一共|总共|共)?(?:存在|有|包含)?|一共有?|总共有?|共有?|有)?"
    r"(?P<number>[一二两三四五六七八九十]|[1-9][0-9]?)(?:只|个|條|条|辆|匹|位|名|座|棵|朵|艘|架|头|处)(?![月点])"
)


def language_defect(text: str, language: str) -> dict[str, Any] | None:
    """Return the values of a wrong_language suspect, or None if the text may be in this language."""
    found = _odd_script(text, language)
    if found is None:
        return None
    return {"text": _short(text), "language": language, "found": found[0], "found_zh": found[1]}


def count_defect(target: Target) -> dict[str, Any] | None:
    """Return the values of a count_mismatch suspect: a description beginning with another number than its boxes."""
    if not target.description or not target.boxes_xyxy:
        return None
    return _count_values(target.description, len(target.boxes_xyxy))


def turn_defects(turn: Turn) -> list[tuple[str, dict[str, Any]]]:
    """Yield (kind, values) of what is wrong with the texts of a verbatim turn."""
    found: list[tuple[str, dict[str, Any]]] = []
    for field, text in (("prompt", turn.prompt), ("answer", turn.answer)):
        try:
            check_box_text(text, field, is_prompt=field == "prompt")
        except Rejected as rejected:
            found.append((rejected.reason, {"detail": rejected.detail}))
    boxes = parse_boxes(turn.answer)
    values = _count_values(turn.answer, len(boxes)) if boxes else None
    return [*found, ("count_mismatch", values)] if values else found


def phrase_defect(target: Target) -> dict[str, Any] | None:
    """Return the values of a bad_box_text suspect: double brackets in a phrase would be read as boxes."""
    for text in (target.phrase, target.description or ""):
        if _OTHER_FORM.search(text):
            return {"detail": f"{_short(text)!r} has double brackets, which only box text may have"}
    return None


def said_count(text: str) -> int | None:
    """Return the number that a description begins with ("two dogs", "图片中有3只狗"), or None."""
    text = text.strip()
    match = _EN_COUNT.match(text) or _ZH_COUNT.match(text)
    if not match:
        return None
    number = match["number"].lower()
    if number.isdigit():
        return int(number)
    return _ZH_NUMBERS.get(number) or _EN_NUMBERS.index(number) + 1


def _count_values(text: str, num_boxes: int) -> dict[str, Any] | None:
    said = said_count(text)
    return None if said in (None, num_boxes) else {"text": _short(text), "said": said, "boxes": num_boxes}


def _odd_script(text: str, language: str) -> tuple[str, str] | None:
    letters = [char for char in text if char.isalpha()]
    foreign = [char for char in letters if not _is_latin_or_chinese(char)]
    if len(_KANA.findall(text)) >= 2 or len(foreign) * 2 > len(letters) > 1:
        return "it is neither English nor Chinese", "既不是英文也不是中文"
    words = _LATIN_WORD.findall(text)
    if detect_language(text) == "en":
        return ("it has no Chinese character", "没有汉字") if language == "zh" and words else None
    if language == "en":
        return "it has Chinese characters", "含有汉字"
    if len(words) >= _MANY_LATIN_WORDS:
        return f"it has {len(words)} English words too", f"另有 {len(words)} 个英文词"
    return None


def _is_latin_or_chinese(char: str) -> bool:
    return char.isascii() or detect_language(char) == "zh" or unicodedata.name(char, "").startswith(("LATIN", "GREEK"))


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:119]}…"
