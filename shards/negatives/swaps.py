"""Change the colour, side or number in phrases of an image, so that nothing in the image matches them.

An attribute often distinguishes an object from others of its kind, which the new phrase might match.
Colour: every other phrase for that kind of object must have a third colour; if not everything is annotated, there must
be no such phrase. Number: only larger ones (three dogs include two), only if the number of boxes equals the number in
the phrase and no other phrase is about that kind of object. Side: "left" nearly always has a "right" next to it and may
be the object's own left; so only if everything is annotated, nothing else is of its kind, and its one box is completely
on the named side. If not everything is annotated, commonplace objects are not used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cogvlm_ft.grounding.targets import Target
from cogvlm_ft.shards.negatives.lexicon import Lexicon
from cogvlm_ft.shards.negatives.meaning import Meaning, Piece, is_chinese, read_meaning
from cogvlm_ft.shards.negatives.photo import Photo, could_be
from cogvlm_ft.shards.packing.candidates import Candidate

_GO_WITH_A_SIDE = {"on", "at", "in", "side"}
_HIGHEST_NUMBER, _MOST_ADDED = 9, 3


def swapped_phrases(candidate: Candidate, photo: Photo, lexicon: Lexicon) -> list[Target]:
    """Return every such phrase of this image as an absent target."""
    found: dict[str, Target] = {}
    for i, (meaning, target) in enumerate(photo.names):
        if target is None or target not in candidate.targets or not _is_simple(meaning, most_attributes=1):
            continue
        is_commonplace = not lexicon.commonplace.isdisjoint(meaning.concepts)
        if photo.mentions(meaning, lexicon) or (is_commonplace and not photo.exhaustive):
            continue
        others = [(name, of) for j, (name, of) in enumerate(photo.names) if j != i]
        family = [(name, of) for name, of in others if could_be(meaning, name, lexicon, trusted=photo.exhaustive)]
        for attribute in meaning.attributes:
            for new in _replacements(attribute, meaning, target, family, photo, candidate, lexicon):
                phrase = _replace_word(target.phrase, attribute.text, new)
                if phrase and _differs_in(attribute, meaning, read_meaning(phrase, lexicon)):
                    found.setdefault(phrase, Target(phrase, target.language, ()))
    return list(found.values())


def _is_simple(meaning: Meaning, *, most_attributes: int) -> bool:
    """Return whether it is one object with its attributes, and nothing else."""
    sides = any(piece.kind == "side" for piece in meaning.attributes)
    plain = not meaning.others - (_GO_WITH_A_SIDE if sides else set())
    return meaning.complete and meaning.num_names == 1 and len(meaning.attributes) <= most_attributes and plain


def _replacements(
    old: Piece,
    meaning: Meaning,
    target: Target,
    family: list[tuple[Meaning, Target | None]],
    photo: Photo,
    candidate: Candidate,
    lexicon: Lexicon,
) -> Iterator[str]:
    """Yield words to replace the old one with."""
    if old.kind == "colour" and lexicon.relatives([lexicon.concept("person")]).isdisjoint(meaning.concepts):
        yield from _other_colours(old, target, family, photo.exhaustive, lexicon)
    elif old.kind == "number" and not family and len(target.boxes_xyxy) == int(old.value):
        (row,) = (row for row in lexicon.grammar.numbers if old.text in row)
        yield from row[int(old.value) : min(int(old.value) + _MOST_ADDED, _HIGHEST_NUMBER)]
    elif old.kind == "side" and not family and photo.exhaustive and _lies_on(old.value, candidate, target):
        yield _opposite_word(old, lexicon)


def _other_colours(
    old: Piece, target: Target, family: list[tuple[Meaning, Target | None]], exhaustive: bool, lexicon: Lexicon
) -> Iterator[str]:
    colours = lexicon.grammar.colours
    taken = {old.value}
    for name, of in family:
        said = {piece.value for piece in name.attributes}
        same_thing = of is not None and of.boxes_xyxy == target.boxes_xyxy and said <= {old.value}
        other_thing = exhaustive and len(said) == 1 and said <= set(colours)
        if not _is_simple(name, most_attributes=1) or not (same_thing or other_thing):
            return
        taken |= said
    for name, colour in colours.items():
        if colour.swap and all(
            name != said and name not in colours[said].near and said not in colour.near for said in taken
        ):
            yield colour.words["zh" if is_chinese(old.text) else "en"][0]


def _lies_on(side: str, candidate: Candidate, target: Target) -> bool:
    """Return whether there is one box, completely in this half of the image."""
    sizes = {"pixels": candidate.stated_size_px, "unit": (1, 1), "thousandths": (1000, 1000)}
    size = sizes[candidate.units]
    if size is None or len(target.boxes_xyxy) != 1:
        return False
    x0, y0, x1, y1 = target.boxes_xyxy[0]
    half_x, half_y = size[0] / 2, size[1] / 2
    return {"left": x1 <= half_x, "right": x0 >= half_x, "top": y1 <= half_y, "bottom": y0 >= half_y}[side]


def _opposite_word(old: Piece, lexicon: Lexicon) -> str:
    language = "zh" if is_chinese(old.text) else "en"
    sides = lexicon.grammar.side_words
    return sides[lexicon.grammar.opposites[old.value]][language][sides[old.value][language].index(old.text)]


def _replace_word(phrase: str, old: str, new: str) -> str | None:
    """Replace the old word; return None unless it occurs exactly once."""
    if is_chinese(old):
        return phrase.replace(old, new) if phrase.count(old) == 1 else None
    found = list(re.finditer(rf"(?<![A-Za-z0-9]){re.escape(old)}(?![A-Za-z0-9])", phrase, re.IGNORECASE))
    if len(found) != 1:
        return None
    start, end = found[0].span()
    before = re.sub(r"\b([Aa])n(\W+)$", r"\1\2", phrase[:start])  # an orange cup -> a blue cup
    return before + (new.capitalize() if found[0][0][0].isupper() else new) + phrase[end:]


def _differs_in(attribute: Piece, old: Meaning, new: Meaning) -> bool:
    """Return whether the new phrase differs from the old one in the value of this attribute only."""
    same = (new.complete, new.concepts, new.core, new.others) == (old.complete, old.concepts, old.core, old.others)
    values = [(piece.kind, piece.value) for piece in new.attributes]
    return same and len(values) == 1 and values[0][0] == attribute.kind and values[0][1] != attribute.value
