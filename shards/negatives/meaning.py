"""Parse what a phrase names: concepts, their colours, sides and numbers, and whether every word is known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from cogvlm_ft.data.record import detect_language
from cogvlm_ft.shards.negatives.lexicon import Lexicon

_LONGEST_CACHED = 100  # letters: phrases recur, long texts do not
_MOST_WORDS = 4  # of a name
_SAYS_HOW = ("ing", "ed", "est", "ly")


@dataclass(frozen=True)
class Piece:
    """A part of a text.

    kind: "name", "colour", "side", "number", "articles", "plain", "links", "amounts", "vague" or "unknown".
    value: the concept, colour, side or number. text: as in the text, but lower-case and singular.
    """

    kind: str
    value: str
    text: str


@dataclass(frozen=True)
class Meaning:
    """The parsed content of a text.

    concepts: all that it names; unless complete also what it may mean: parts of names, misspelled names.
    complete: every word is known, and the subject of the phrase is among the concepts.
    content: the words that are more than grammar. head: the last of them in the subject, or "".
    core: names and unknown words; whole: all words. In both an English word has blanks around it.
    attributes: colours, sides and numbers. others: words besides articles, attributes and names.
    """

    language: str
    concepts: frozenset[str]
    num_names: int
    complete: bool
    content: frozenset[str]
    head: str
    core: str
    whole: str
    attributes: tuple[Piece, ...]
    others: frozenset[str]
    unknown: tuple[str, ...]
    vague: bool


def read_meaning(text: str, lexicon: Lexicon) -> Meaning:
    """Parse a phrase, or a longer text, which is seldom complete."""
    return _cached(text, lexicon) if len(text) <= _LONGEST_CACHED else _read(text, lexicon)


@lru_cache(maxsize=8192)
def _cached(text: str, lexicon: Lexicon) -> Meaning:
    return _read(text, lexicon)


def _read(text: str, lexicon: Lexicon) -> Meaning:
    tokens = lexicon.grammar.tokens(text)
    pieces = _pieces(tokens, lexicon)
    kinds = {piece.kind for piece in pieces}
    content = [piece for piece in pieces if piece.kind in ("name", "unknown")]
    head = _head(pieces)
    is_question = "?" in text or "？" in text
    complete = any(piece.kind == "name" for piece in head) and not is_question and not kinds & {"unknown", "vague"}
    concepts = frozenset(piece.value for piece in pieces if piece.kind == "name")
    about = [piece.text for piece in head if piece in content]
    return Meaning(
        language=detect_language(text),
        concepts=concepts if complete else concepts | frozenset(_possible_concepts(tokens, lexicon)),
        num_names=sum(piece.kind == "name" for piece in pieces),
        complete=complete,
        content=frozenset(word for piece in content for word in piece.text.split(" ")),
        head=about[-1].split(" ")[-1] if about else "",
        core=_joined(piece.text for piece in content),
        whole=_joined(tokens),
        attributes=tuple(piece for piece in pieces if piece.kind in ("colour", "side", "number")),
        others=frozenset(
            piece.text for piece in pieces if piece.kind in ("plain", "links", "amounts", "vague", "unknown")
        ),
        unknown=tuple(piece.text for piece in pieces if piece.kind == "unknown"),
        vague="vague" in kinds,
    )


def _joined(texts: Iterable[str]) -> str:
    return "".join(f" {word} " if not is_chinese(word) else word for text in texts for word in text.split(" "))


def is_chinese(word: str) -> bool:
    """Return whether a word is a run of Chinese."""
    return detect_language(word) == "zh"


def _head(pieces: Sequence[Piece]) -> list[Piece]:
    """Return what the phrase is about: in English before "on", "with" ..., in Chinese after the last 的."""
    last = max((i for i, piece in enumerate(pieces) if piece.text == "的"), default=-1)
    head: list[Piece] = []
    for piece in pieces[last + 1 :]:
        if piece.kind != "links":
            head.append(piece)
        elif piece.text == "of" and head and head[-1].kind == "amounts" and not any(p.kind == "name" for p in head):
            head = []  # a slice of pizza
        else:
            break
    return head


def _pieces(tokens: Sequence[str], lexicon: Lexicon) -> list[Piece]:
    pieces: list[Piece] = []
    i = 0
    while i < len(tokens):
        if is_chinese(tokens[i]):
            _add_chinese(pieces, tokens[i], lexicon)
            i += 1
        else:
            piece = _english_piece(tokens[i : i + _MOST_WORDS + 1], lexicon)
            pieces.append(piece)
            i += piece.text.count(" ") + 1
    return pieces


def _english_piece(tokens: Sequence[str], lexicon: Lexicon) -> Piece:
    """Return the longest piece that starts here."""
    token = tokens[0]
    kind, value = lexicon.grammar.kinds.get(token, ("", ""))
    name = _name(tokens, lexicon)
    if name and not (kind == "colour" and name.text == token and _name(tokens[1:], lexicon)):  # the orange cup
        return name
    if token in lexicon.vague:
        return Piece("vague", "", token)
    if kind:
        return Piece(kind, value, token)
    is_plain = len(token) > 5 and token.endswith(_SAYS_HOW) and not lexicon.misspelled(token)
    return Piece("plain" if is_plain else "unknown", "", token)


def _name(tokens: Sequence[str], lexicon: Lexicon) -> Piece | None:
    for count in range(min(_MOST_WORDS, len(tokens)), 0, -1):
        name = " ".join(tokens[:count])
        joined = name.replace(" ", "")  # lap top, hotdog
        concept = (
            lexicon.names.get(name) or lexicon.joined.get(joined) or (lexicon.names.get(joined) if count == 2 else None)
        )
        if concept:
            return Piece("name", concept, name)
    return None


def _add_chinese(pieces: list[Piece], run: str, lexicon: Lexicon) -> None:
    i = 0
    while i < len(run):
        found, length = _chinese_piece(run, i, pieces[-1] if pieces else None, lexicon)
        last = pieces[-1] if pieces else None
        if found.kind == "unknown" and last and last.kind == "unknown" and is_chinese(last.text) and i:
            pieces[-1] = Piece("unknown", "", last.text + found.text)
        else:
            pieces.append(found)
        i += length


def _chinese_piece(run: str, start: int, before: Piece | None, lexicon: Lexicon) -> tuple[Piece, int]:
    """Return the longest piece that starts here, and its length; a colour may include 色."""
    kinds, rest = lexicon.grammar.kinds, len(run) - start
    for length in range(min(lexicon.longest_chinese, rest), 0, -1):
        text, end = run[start : start + length], start + length
        if length == 1 and end < len(run) and text in lexicon.grammar.measures and _is_counted(before):  # 一头牛
            return Piece("articles", "", text), length
        if text in lexicon.names:
            return Piece("name", lexicon.names[text], text), length
        if text in lexicon.vague:
            return Piece("vague", "", text), length
        kind, value = kinds.get(text, ("", ""))
        if kind == "colour" and (run[end : end + 1] in ("色", "的") or _starts_with_name(run, end, lexicon)):
            return Piece(kind, value, text), length + run.startswith("色", end)
        if kind == "number" and run[end : end + 1] in lexicon.grammar.measures:
            return Piece(kind, value, text), length
        if kind and kind not in ("colour", "number"):
            return Piece(kind, value, text), length
    return Piece("unknown", "", run[start]), 1


def _is_counted(before: Piece | None) -> bool:
    return before is not None and (before.kind == "number" or (before.kind == "articles" and before.text != "的"))


def _starts_with_name(run: str, start: int, lexicon: Lexicon) -> bool:
    return any(
        run[start:end] in lexicon.names for end in range(start + 1, min(start + lexicon.longest_chinese, len(run)) + 1)
    )


def _possible_concepts(tokens: Sequence[str], lexicon: Lexicon) -> Iterator[str]:
    """Yield the concept of every name that is part of the text, and of those that a word may misspell."""
    for i, token in enumerate(tokens):
        if is_chinese(token):
            for start in range(len(token)):
                texts = (
                    token[start:end] for end in range(start + 1, min(start + lexicon.longest_chinese, len(token)) + 1)
                )
                yield from (lexicon.names[text] for text in texts if text in lexicon.names)
            continue
        for count in range(1, _MOST_WORDS + 1):
            name = " ".join(tokens[i : i + count])
            joined = name.replace(" ", "")
            found = (lexicon.names.get(name), lexicon.joined.get(joined), lexicon.names.get(joined))
            yield from (concept for concept in found if concept)
        if token not in lexicon.names and token not in lexicon.grammar.kinds and (concept := lexicon.misspelled(token)):
            yield concept
