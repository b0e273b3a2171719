"""Synonyms and hierarchies of names: the built-in lexicon and the user's file."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.packing.label_names import load_names
from cogvlm_ft.yaml_text import read_yaml

_CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(rf"[a-z]+|[0-9]+|[{_CJK}]+|[^\W\d_a-z{_CJK}]+")
_POSSESSIVE = re.compile(r"'s?\b")
_FORM = (
    "synonyms, together: lists of names in a list; parents: a list for each name; commonplace, vague: a list of names"
)
_LISTS_OF_LISTS, _LISTS = ("synonyms", "together"), ("commonplace", "vague")


@dataclass(frozen=True)
class Colour:
    """words: by language, the usual one first. near: colours of which both may be said. swap: may replace others."""

    name: str
    words: dict[str, list[str]]
    near: frozenset[str]
    swap: bool


class Grammar:
    """The words around names: colours, sides, numbers, articles, negations."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.plurals: dict[str, str] = content["plurals"]
        self.colours = {
            name: Colour(name, {"en": row["en"], "zh": row["zh"]}, frozenset(row["near"]), row.get("swap", False))
            for name, row in content["colours"].items()
        }
        self.side_words: dict[str, dict[str, list[str]]] = content["sides"]
        self.opposites: dict[str, str] = content["opposites"]
        self.numbers: list[list[str]] = list(content["numbers"].values())
        self.measures = frozenset(content["measures"])
        self.negations = {language: frozenset(words) for language, words in content["negations"].items()}
        self.kinds: dict[str, tuple[str, str]] = {}
        for kind in ("plain", "links", "articles"):
            self._add(kind, ((word, word) for words in content[kind].values() for word in words))
        self._add("amounts", ((word, word) for word in content["amounts"]))
        self._add("number", ((row[n], str(n + 1)) for row in self.numbers for n in range(1, len(row))))
        self._add("side", ((w, side) for side, by in self.side_words.items() for ws in by.values() for w in ws))
        self._add("colour", ((word, c.name) for c in self.colours.values() for row in c.words.values() for word in row))

    def _add(self, kind: str, words: Iterable[tuple[str, str]]) -> None:
        """Register words; a word with several kinds keeps the last: top is a side, not a part."""
        self.kinds.update({self.singular(word): (kind, value) for word, value in words})

    def tokens(self, text: str) -> list[str]:
        """Return lower-case singular words and runs of Chinese; width, accents and punctuation are ignored."""
        if not text.isascii():
            text = "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))
            text = unicodedata.normalize("NFKC", text).replace("\u2019", "'")
        return [self.singular(token) for token in _TOKEN.findall(_POSSESSIVE.sub(" ", text.casefold()))]

    def singular(self, token: str) -> str:
        """Return one form for singular and plural; it is not always a word, but always the same."""
        if token in self.plurals or len(token) < 4 or not token.isascii():
            return self.plurals.get(token, token)
        if token.endswith("ies") and len(token) > 4:
            return token[:-3] + "y"
        if token.endswith(("sses", "ches", "shes", "xes", "zes", "oes")):
            return token[:-2]
        return token if token.endswith(("ss", "us", "is")) or not token.endswith("s") else token[:-1]


class Lexicon:
    """The meaning of names, from the built-in table and the user's file.

    names: every name -> its concept, which is one of its names; English names are singular words joined by blanks.
    joined: English names of several words, written without blanks -> their concepts.
    """

    def __init__(self, grammar: Grammar, tables: list[dict[str, Any]]) -> None:
        self.grammar = grammar
        parents = [pair for table in tables for pair in _parent_pairs(table)]
        together, commonplace = _entries(tables, "together"), _entries(tables, "commonplace")
        mentioned = [name for group in (*parents, *together, commonplace) for name in group]
        groups = [*_entries(tables, "synonyms"), *([name] for name in mentioned)]
        self.names = _join_groups([[self.name(name) for name in group] for group in groups])
        self.joined = {name.replace(" ", ""): concept for name, concept in self.names.items() if " " in name}
        self.longest_chinese = max(len(name) for name in self.names if not name.isascii())
        self.vague = frozenset(self.name(word) for word in _entries(tables, "vague"))
        self.commonplace = frozenset(self.concept(name) for name in commonplace)
        user_names = [self.name(name) for group in _entries(tables[1:], "synonyms") for name in group]
        self._relations = _Relations(
            [*((self.concept(parent), self.concept(child)) for parent, child in parents), *self._by_ending(user_names)],
            [frozenset(map(self.concept, group)) for group in together],
        )
        self._misspellings = _Misspellings(self.names)

    def name(self, word: str) -> str:
        """Return the form of a name that `names` holds."""
        return " ".join(self.grammar.tokens(word))

    def concept(self, word: str) -> str:
        """Return the concept of a name that the tables hold."""
        return self.names[self.name(word)]

    def relatives(self, concepts: Iterable[str]) -> frozenset[str]:
        """Return the concepts, everything they are a kind of, and everything that is a kind of them."""
        return frozenset[str]().union(*map(self._relations.relatives, concepts))

    def company(self, concepts: Iterable[str]) -> frozenset[str]:
        """Return the relatives, and what is usually seen together with these concepts or a kind of them."""
        return frozenset[str]().union(*map(self._relations.company, concepts))

    def misspelled(self, word: str) -> str | None:
        """Return the concept whose name has one letter more, less or changed, or two letters exchanged."""
        return self._misspellings.concept(word)

    def _by_ending(self, names: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Yield (parent, child): a police dog is a dog, 工程车 is a 车."""
        for name in names:
            parent = next((self.names[end] for end in _endings(name) if end in self.names), None)
            if parent:
                yield parent, self.names[name]


class _Relations:
    """Which concepts are kinds of others, and which are seen together. pairs: (parent, child)."""

    def __init__(self, pairs: Iterable[tuple[str, str]], together: list[frozenset[str]]) -> None:
        self._parents: dict[str, set[str]] = defaultdict(set)
        self._children: dict[str, set[str]] = defaultdict(set)
        for parent, child in pairs:
            self._parents[child].add(parent)
            self._children[parent].add(child)
        self._together = together
        self._relatives: dict[str, frozenset[str]] = {}
        self._company: dict[str, frozenset[str]] = {}

    def relatives(self, concept: str) -> frozenset[str]:
        """Return what `Lexicon.relatives` describes."""
        if concept not in self._relatives:
            self._relatives[concept] = _reach(concept, self._parents) | _reach(concept, self._children)
        return self._relatives[concept]

    def company(self, concept: str) -> frozenset[str]:
        """Return what `Lexicon.company` describes."""
        if concept not in self._company:
            kinds = _reach(concept, self._children)
            seen = {other for group in self._together if not group.isdisjoint(kinds) for other in group}
            wider = [_reach(other, self._parents) | self._children.get(other, set()) for other in seen]
            self._company[concept] = self.relatives(concept).union(*wider)
        return self._company[concept]


class _Misspellings:
    """Names of five letters or more, indexed by what is left without one of their letters."""

    def __init__(self, names: Mapping[str, str]) -> None:
        long_names = [name for name in names if name.isascii() and name.isalpha() and len(name) > 4]
        self._concepts = {form: names[name] for name in reversed(long_names) for form in _shortened(name)}
        self._max_letters = max(map(len, long_names)) + 1

    def concept(self, word: str) -> str | None:
        """Return what `Lexicon.misspelled` describes."""
        if not 4 <= len(word) <= self._max_letters:
            return None
        return next((self._concepts[form] for form in _shortened(word) if form in self._concepts), None)


@cache
def load_lexicon(path: Path | None, names: Path | None = None) -> Lexicon:
    """Return the built-in lexicon with a YAML file of the same form added to it; raises DataError. Cached.

    names: a file of words for labels (`packing/label_names.py`): a label means what its words mean.
    """
    folder = resources.files("cogvlm_ft.shards.negatives")
    grammar = Grammar(yaml.safe_load((folder / "grammar.yaml").read_text(encoding="utf-8")))
    tables = [yaml.safe_load((folder / "lexicon.yaml").read_text(encoding="utf-8"))]
    if path is not None:
        tables.append(_load_table(path))
    if names is not None:
        tables.append({"synonyms": load_names(names).synonyms()})
    return Lexicon(grammar, tables)


def _load_table(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path)
    except OSError as error:
        raise DataError(f"--synonyms {path}: {error.strerror}; expected a YAML file: {_FORM}") from None
    except ValueError as error:
        raise DataError(f"--synonyms {path}: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"--synonyms {path}: {content!r:.80}; expected {_FORM}")
    for key, value in content.items():
        if not _is_valid_entry(key, value):
            hint = 'Quote words like "on" and "no".'
            raise DataError(f"--synonyms {path}: {key!r} is {value!r:.80}; expected {_FORM}. {hint}")
    return content


def _is_valid_entry(key: Any, value: Any) -> bool:
    if key in _LISTS_OF_LISTS:
        return isinstance(value, list) and all(map(_are_names, value))
    if key in _LISTS:
        return _are_names(value)
    return key == "parents" and isinstance(value, dict) and all(map(_are_names, [list(value), *value.values()]))


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and any(map(str.isalnum, name)) for name in value)


def _entries(tables: Iterable[dict[str, Any]], key: str) -> list[Any]:
    return [entry for table in tables for entry in table.get(key, [])]


def _parent_pairs(table: dict[str, Any]) -> list[tuple[str, str]]:
    return [(parent, child) for parent, children in table.get("parents", {}).items() for child in children]


def _join_groups(groups: list[list[str]]) -> dict[str, str]:
    """Map each name to its concept, the first name of its group; groups with a common name become one."""
    names: dict[str, str] = {}
    members: dict[str, list[str]] = {}
    for group in groups:
        found = list(dict.fromkeys(names[name] for name in group if name in names))
        concept = found[0] if found else group[0]
        fresh = [name for name in group if name not in names]
        moved = [name for other in found[1:] for name in members.pop(other)]
        members.setdefault(concept, []).extend(fresh + moved)
        names.update(dict.fromkeys(fresh + moved, concept))
    return names


def _endings(name: str) -> list[str]:
    """Return the shorter names that the name may end in, longest first."""
    if " " in name:
        words = name.split(" ")
        return [" ".join(words[i:]) for i in range(1, len(words))]
    return [] if name.isascii() else [name[i:] for i in range(1, len(name))]


def _reach(start: str, steps: Mapping[str, set[str]]) -> frozenset[str]:
    found, open_ends = {start}, [start]
    while open_ends:
        for other in steps.get(open_ends.pop(), ()):
            if other not in found:
                found.add(other)
                open_ends.append(other)
    return frozenset(found)


def _shortened(word: str) -> list[str]:
    """Return the word, and the word without each of its letters; two words with a common form are similar."""
    return [word, *(word[:i] + word[i + 1 :] for i in range(len(word)))]
