"""Check the box text in prompts and answers written by users: it is kept unchanged or rejected."""

from __future__ import annotations

import re

from cogvlm_ft.shards.packing.candidates import Rejected

_GROUP = re.compile(r"\[\[([^\[\]]*)\]\]")
_EXACT = re.compile(r"[0-9]{3}(?:,[0-9]{3}){3}(?:;[0-9]{3}(?:,[0-9]{3}){3})*")
_NAMED = re.compile(r"[A-Za-z]\w*(?:,[A-Za-z]\w*){3}")  # prompts ask for the form by name: [[x0,y0,x1,y1]]
_NUMBER = r"\s*-?[0-9]+(?:\.[0-9]+)?\s*"
_FOREIGN = re.compile(
    rf"[\[(<{{（【]{_NUMBER}(?:[,，]{_NUMBER}){{3}}[\])>}}）】]"  # four numbers in brackets
    rf"|\({_NUMBER},{_NUMBER}\)\s*(?:,\s*)?\({_NUMBER},{_NUMBER}\)"  # two points
    r"|</?(?:box|bbox|quad|ref|ref-object)>|<\|(?:box|quad|object_ref)_(?:start|end)\|>|<loc_?[0-9]+>|\"bbox(?:_2d)?\""
)
_EXPECTED = (
    "expected [[x0,y0,x1,y1]]: thousandths of width and height from 000 to 999, three digits each, no blanks, "
    "no asterisks; several boxes as [[086,540,400,760;000,000,998,997]]"
)


def check_box_text(text: str, field: str, *, is_prompt: bool) -> None:
    """Raise Rejected if the text has boxes that are not written exactly as the model was trained to write them.

    The official parser skips other forms, and a model that has learned them writes them.
    """
    groups = list(_GROUP.finditer(text))
    if any(any(char.isdigit() for char in group[1]) or _NAMED.fullmatch(group[1]) for group in groups):
        for group in groups:
            if not (is_prompt and _NAMED.fullmatch(group[1])):
                _check_group(text, group, field)
    foreign = _FOREIGN.search(_GROUP.sub("", text))
    if foreign:
        raise Rejected("turn", "bad_box_text", f"{field} has {foreign[0]!r:.80}; {_EXPECTED}")


def _check_group(text: str, group: re.Match[str], field: str) -> None:
    around = text[max(group.start() - 1, 0) : group.start()] + text[group.end() : group.end() + 1]
    framed = any(char in "*[]" for char in around)
    if framed or not _EXACT.fullmatch(group[1]):
        found = text[max(group.start() - 2, 0) : group.end() + 2].strip() if framed else group[0]
        raise Rejected("turn", "bad_box_text", f"{field} has {found!r:.80}; {_hint(group[1])}{_EXPECTED}")
    for item in group[1].split(";"):
        x0, y0, x1, y1 = (int(number) for number in item.split(","))
        if x0 > x1 or y0 > y1:
            raise Rejected(
                "turn", "inverted_box", f"{field} has {item} in {group[0]!r:.80}; expected x0 <= x1 and y0 <= y1"
            )


def _hint(content: str) -> str:
    """Suggest the expected form, if the numbers themselves are valid."""
    numbers = re.findall(r"[0-9]+", content)
    if "." in content or not numbers or len(numbers) % 4 or any(len(number) > 3 for number in numbers):
        return ""
    items = (",".join(number.zfill(3) for number in numbers[i : i + 4]) for i in range(0, len(numbers), 4))
    return f"write [[{';'.join(items)}]]; "
