"""Check the box text in prompts and answers of users: it is kept, written in the model's own form, or rejected.

The model's form is `[[x0,y0,x1,y1]]`, thousandths in three digits. Tools, translators and people write the same box
with full-width characters, other brackets, blanks or Markdown. It is rewritten where the meaning is certain: double
brackets around numbers of three digits, or padded numbers such as 086 in any brackets or none, as pixels are never
padded.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise
from typing import NamedTuple

from cogvlm_ft.shards.packing.candidates import Problem, Rejected

_EXPECTED = (
    "expected [[x0,y0,x1,y1]]: thousandths of width and height from 000 to 999, three digits each, no blanks, "
    "no asterisks; several boxes as [[086,540,400,760;000,000,998,997]]"
)
_BOX = r"[0-9]{3}(?:,[0-9]{3}){3}"
_EXACT = re.compile(rf"(?<![\[*\\])\[\[({_BOX}(?:;{_BOX})*)\]\](?![\]*])")
_FRAMED = re.compile(rf"[*\[\]]\[\[{_BOX}(?:;{_BOX})*\]\]|\[\[{_BOX}(?:;{_BOX})*\]\][*\[\]]")
_NAMES = re.compile(r"\[\[[A-Za-z]\w*(?:,[A-Za-z]\w*){3}\]\]")  # prompts ask for the form by name: [[x0,y0,x1,y1]]
_WIDE_NAMES = re.compile(r"[\[［【]{2}\s*([A-Za-z]\w*)" + r"\s*[,，、]\s*([A-Za-z]\w*)" * 3 + r"\s*[\]］】]{2}")
_TAGS = re.compile(
    r"</?(?:box|bbox|quad|ref|ref-object)>|<\|(?:box|quad|object_ref)_(?:start|end)\|>|<loc_?[0-9]+>"
    r"|<\|/?(?:ref|det)\|>|<\|(?:begin|end)_of_box\|>|<patch_index_[0-9]+>|\"(?:bbox(?:_2d)?|box_2d|point_2d)\""
)

_OPENING, _CLOSING = "[(<{（［【〔「『〖〈《｛﹝﹙", "])>}）］】〕」』〗〉》｝﹞﹚"
_NESTED = re.compile(
    rf"[{re.escape(_OPENING)}]\s*[{re.escape(_OPENING)}]|[{re.escape(_CLOSING)}]\s*[{re.escape(_CLOSING)}]|[⟦⟧]"
)
_UNPADDED = re.compile(r"has '\[\[(\d+(?:[,;\s]+\d+){3,})\]\]'")  # in a message
_DIGITS = re.compile(r"\d+")
_COMMAS, _SEMICOLONS = ",，、﹐､،", ";；﹔"
_UNSEEN = "*`\\\u200b\u200c\u200d\u2060\ufeff＊"  # Markdown, and characters without width
_TOKEN = re.compile(
    r"(?P<number>(?:(?<![\w)\]）］】])[-−－])?(?<![A-Za-z0-9_.])\d+(?:[.．]\d+)?(?![A-Za-z_]))"
    rf"|(?P<open>[{re.escape(_OPENING)}]|⟦)|(?P<close>[{re.escape(_CLOSING)}]|⟧)"
    rf"|(?P<comma>[{_COMMAS}])|(?P<semicolon>[{_SEMICOLONS}])|(?P<space>\s+)|(?P<unseen>[{re.escape(_UNSEEN)}]+)"
    r"|(?P<other>[^\W\d_]+|.)",
    re.DOTALL,
)
_KINDS = {"number": "n", "open": "[", "close": "]", "comma": ",", "semicolon": ";", "other": "x"}

# Structures: one character per token; "_" is a blank between two numbers.
_SPLIT = r"[,_]"
_FOUR = rf"n{_SPLIT}n{_SPLIT}n{_SPLIT}n"
_POINT = rf"n{_SPLIT}n"
_IN_BRACKETS = re.compile(
    rf"\[{{1,4}}{_FOUR}(?:(?:;|\][,;]?\[){_FOUR})*\]{{1,4}}"  # boxes
    rf"|\[{{1,3}}{_POINT}(?:[;]|\][,;]?\[){_POINT}\]{{1,3}}"  # two points
    rf"|\[{{2,4}}{_FOUR}(?![,;_\]])|(?<![,;_\[]){_FOUR}\]{{2,4}}"  # a side is missing
)
_BARE = re.compile(r"(?<![n,;_\[])n,n,n,n(?![,;_]*[n\]])")
_DOUBLE = re.compile(r"\[\[[^\]x]{0,99}n|n[^\[x]{0,99}\]\]")

_CONNECTOR = re.compile(
    r"(?:[\s,，、;；:：=\"'{}()（）\[\]［］【】*-]|and|to|[xy][0-3]?|[xy]_?(?:min|max)|left|top|right|bottom"
    r"|upper|lower|corner|左上角?|右下角?|坐标|点|为|是|在|和|到|至){0,20}",
    re.IGNORECASE,
)
_SPEAKS_OF_BOXES = re.compile(
    r"区域|坐标|边界框|边框|方框|左上|bbox|bounding|coordinate|region|\b[xy][0-3]\b|[xy]_?min|\bleft\b", re.IGNORECASE
)
_WORDS_BEFORE = 24
_LONGEST_GAP = 40
_SENTENCE_END = re.compile(r"[。！？!?\n]|\]\]")
_SIGNS = dict.fromkeys("-−－", "-")


class _Token(NamedTuple):
    kind: str
    start: int
    end: int


class _Found(NamedTuple):
    """Numbers that look like boxes. text: as written; numbers: in ASCII digits."""

    start: int
    end: int
    text: str
    numbers: tuple[str, ...]
    is_double: bool = False


def check_box_text(text: str, field: str, *, is_prompt: bool) -> None:
    """Raise Rejected if the text has boxes that are not written exactly as the model was trained to write them.

    The official parser skips other forms, and a model that has learned them writes them.
    """
    written = normalise_box_text(text, field, is_prompt=is_prompt)
    if written != text:
        raise _rejected(field, text, f"write {written!r:.80}; ")


def normalise_box_text(text: str, field: str, *, is_prompt: bool) -> str:
    """Return the text with all boxes in the model's form; raises Rejected if it is not certain what they mean.

    Prompts may ask for the form by name, as in [[x0,y0,x1,y1]].
    """
    if is_prompt:
        text = _WIDE_NAMES.sub(lambda names: f"[[{','.join(names.groups())}]]", text)
    names = None if is_prompt else _WIDE_NAMES.search(text)
    foreign = _TAGS.search(text) or (
        names if names and (_NAMES.fullmatch(names[0]) or _DIGITS.search(names[0])) else None
    )
    if foreign:
        raise _rejected(field, foreign[0], "")
    for group in _EXACT.finditer(text):
        _check_corners(group[1].replace(";", ",").split(","), field, group[0])
    rest = _EXACT.sub("", text)
    if len(_DIGITS.findall(rest)) < 4 and not (_NESTED.search(rest) and _DIGITS.search(rest)):
        return text
    written, last = [], 0
    tokens = _tokens(text, is_prompt)
    found = _found(text, tokens)
    for boxes in found:
        written += [text[last : boxes.start], _written(boxes, field)]
        last = boxes.end
    _check_rest(text, _outside(tokens, found), field)
    result = "".join([*written, text[last:]])
    for group in _FRAMED.finditer(result):
        raise _rejected(field, group[0], "remove what is directly around the brackets; ")
    return result


def num_padded_boxes(text: str) -> tuple[int, int]:
    """Return how many boxes the text has in the model's form, and how many of these have a number such as 086."""
    boxes = [box for group in _EXACT.finditer(text) for box in group[1].split(";")]
    return len(boxes), sum(_is_padded(box.split(",")) for box in boxes)


def is_unpadded_box(problem: Problem) -> bool:
    """Return whether this is about numbers in double brackets that are not written as thousandths."""
    found = _UNPADDED.search(problem.detail) if problem.reason == "bad_box_text" else None
    return found is not None and any(len(number) != 3 for number in _DIGITS.findall(found[1]))


def _tokens(text: str, is_prompt: bool) -> list[_Token]:
    """Split the text; boxes in the model's form, and names of coordinates in prompts, are one "other" token each."""
    kept = [match.span() for pattern in (_EXACT, *([_NAMES] if is_prompt else [])) for match in pattern.finditer(text)]
    tokens: list[_Token] = []
    position = 0
    for start, end in [*sorted(kept), (len(text), len(text))]:
        for match in _TOKEN.finditer(text, position, start):
            kind = match.lastgroup or "other"
            tokens += [_Token(kind, *match.span())] * (2 if match[0] in "⟦⟧" else 1)
        if start < end:
            tokens.append(_Token("other", start, end))
        position = end
    return tokens


def _found(text: str, tokens: list[_Token]) -> list[_Found]:
    """Return what looks like boxes, in order."""
    seen: list[_Token] = []
    kinds: list[str] = []
    for i, token in enumerate(tokens):
        if token.kind == "space":
            is_between = 0 < i < len(tokens) - 1 and tokens[i - 1].kind == tokens[i + 1].kind == "number"
            if not is_between:
                continue
        elif token.kind == "unseen":
            continue
        seen.append(token)
        kinds.append(_KINDS.get(token.kind, "_"))
    structure = "".join(kinds)
    spans = [match.span() for match in _IN_BRACKETS.finditer(structure)]
    taken = "".join(structure[a:b] + "x" * (c - b) for (a, b), c in _pairs(spans, len(structure)))
    spans += [match.span() for match in _BARE.finditer(taken) if _is_padded_box(text, seen[slice(*match.span())])]
    return [_found_at(text, seen[start:end], structure[start:end]) for start, end in sorted(spans)]


def _pairs(spans: list[tuple[int, int]], length: int) -> list[tuple[tuple[int, int], int]]:
    """Return the gaps between spans, each with the end of the span that follows."""
    starts = [0, *(end for _, end in spans)]
    return [((start, until), end) for start, (until, end) in zip(starts, [*spans, (length, length)], strict=True)]


def _found_at(text: str, tokens: list[_Token], structure: str) -> _Found:
    numbers = tuple(_ascii(text[token.start : token.end]) for token in tokens if token.kind == "number")
    start, end = _with_emphasis(text, tokens[0].start, tokens[-1].end)
    is_double = structure.startswith("[[") or structure.endswith("]]")
    return _Found(start, end, text[start:end], numbers, is_double and "n" in structure)


def _with_emphasis(text: str, start: int, end: int) -> tuple[int, int]:
    """Extend a span by the same Markdown marks on both sides, and by backslashes before it."""
    while start > 0 and end < len(text) and text[start - 1] == text[end] and text[end] in "*`＊":
        start, end = start - 1, end + 1
    while start > 0 and text[start - 1] == "\\":
        start -= 1
    return start, end


def _is_padded_box(text: str, tokens: list[_Token]) -> bool:
    numbers = [_ascii(text[token.start : token.end]) for token in tokens if token.kind == "number"]
    return _is_padded(numbers) and _is_ordered(numbers)


def _is_padded(numbers: list[str] | tuple[str, ...]) -> bool:
    """Return whether the numbers are thousandths beyond doubt: three digits each, one of them with a leading zero."""
    return all(len(n) == 3 and n.isdigit() for n in numbers) and any(n[0] == "0" for n in numbers)


def _is_ordered(numbers: list[str]) -> bool:
    x0, y0, x1, y1 = (float(number) for number in numbers)
    return x0 < x1 and y0 < y1


def _ascii(text: str) -> str:
    return "".join(str(unicodedata.decimal(char)) if char.isdecimal() else _SIGNS.get(char, ".") for char in text)


def _written(found: _Found, field: str) -> str:
    """Return the boxes in the model's form; raises Rejected unless they are certain."""
    numbers = found.numbers
    is_certain = _is_padded(numbers) or (found.is_double and all(len(n) == 3 and n.isdigit() for n in numbers))
    if not is_certain:
        raise _rejected(field, found.text, _hint(numbers))
    _check_corners(numbers, field, found.text)
    items = (",".join(numbers[i : i + 4]) for i in range(0, len(numbers), 4))
    return f"[[{';'.join(items)}]]"


def _check_corners(numbers: list[str] | tuple[str, ...], field: str, text: str) -> None:
    for i in range(0, len(numbers), 4):
        x0, y0, x1, y1 = (int(number) for number in numbers[i : i + 4])
        if x0 > x1 or y0 > y1:
            item = ",".join(numbers[i : i + 4])
            detail = f"{field} has {item} in {text!r:.80}; expected x0 <= x1 and y0 <= y1"
            raise Rejected("turn", "inverted_box", detail)


def _check_rest(text: str, tokens: list[_Token], field: str) -> None:
    """Raise Rejected if there are double brackets with numbers, or four numbers that are spoken of as a box."""
    seen = [token for token in tokens if token.kind not in ("space", "unseen")]
    double = _DOUBLE.search("".join(_KINDS[token.kind] for token in seen))
    if double:
        start, end = seen[double.start()].start, seen[double.end() - 1].end
        raise _rejected(field, text[start:end], "")
    numbers = [(token, _ascii(text[token.start : token.end])) for token in tokens if token.kind == "number"]
    is_joined = [_is_connector(text[a.end : b.start]) for (a, _), (b, _) in pairwise(numbers)]
    for i in range(len(numbers) - 3):
        if not all(is_joined[i : i + 3]):
            continue
        values = [value for _, value in numbers[i : i + 4]]
        start, end = numbers[i][0].start, numbers[i + 3][0].end
        before = _SENTENCE_END.split(text[max(0, start - _WORDS_BEFORE) : start])[-1]
        is_box = _is_padded(values) or _SPEAKS_OF_BOXES.search(before + text[start:end])
        if is_box and _is_ordered(values):
            raise _rejected(field, text[start:end], _hint(tuple(values)))


def _is_connector(gap: str) -> bool:
    """Return whether a box may have this text between two numbers; a telephone number has hyphens."""
    return gap != "-" and 0 < len(gap) <= _LONGEST_GAP and bool(_CONNECTOR.fullmatch(gap))


def _outside(tokens: list[_Token], found: list[_Found]) -> list[_Token]:
    """Return the tokens that belong to no box."""
    rest: list[_Token] = []
    i = 0
    for token in tokens:
        while i < len(found) and found[i].end <= token.start:
            i += 1
        if i == len(found) or token.start < found[i].start:
            rest.append(token)
    return rest


def _rejected(field: str, found: str, hint: str) -> Rejected:
    return Rejected("turn", "bad_box_text", f"{field} has {found!r:.80}; {hint}{_EXPECTED}")


def _hint(numbers: tuple[str, ...]) -> str:
    """Suggest the model's form, if the numbers themselves could be thousandths."""
    if len(numbers) % 4 or any(len(number) > 3 or not number.isdigit() for number in numbers):
        return ""
    items = (",".join(number.zfill(3) for number in numbers[i : i + 4]) for i in range(0, len(numbers), 4))
    return f"if these are thousandths, write [[{';'.join(items)}]]; "
