"""Which names name one thing, which a kind of another: the built-in words and those of the user."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from cogvlm_ft.errors import DataError

_CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(rf"[a-z]+|[0-9]+|[{_CJK}]+|[^\W\d_a-z{_CJK}]+")
_POSSESSIVE = re.compile(r"'s?\b")
_FORM = (
    "synonyms, together: lists of names in a list; parents: a list for each name; commonplace, vague: a list of names"
)
_LISTS_OF_LISTS, _LISTS = ("synonyms", "together"), ("commonplace", "vague")


@dataclass(frozen=True)
class Colour:
    """words: by language, the usual one first. near: may be said of the same thing. swap: may replace one."""

    name: str
    words: dict[str, list[str]]
    near: frozenset[str]
    swap: bool


class Grammar:
    """The words around the names of things."""

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
        """A word that has more than one kind has the last: top is a side, no part of something."""
        self.kinds.update({self.singular(word): (kind, value) for word, value in words})

    def tokens(self, text: str) -> list[str]:
        """Words, small and in the singular, and runs of Chinese; width, accents and marks make no difference."""
        if not text.isascii():
            text = "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))
            text = unicodedata.normalize("NFKC", text).replace("\u2019", "'")
        return [self.singular(token) for token in _TOKEN.findall(_POSSESSIVE.sub(" ", text.casefold()))]

    def singular(self, token: str) -> str:
        """One form for both numbers; not always a word, but always the same one."""
        if token in self.plurals or len(token) < 4 or not token.isascii():
            return self.plurals.get(token, token)
        if token.endswith("ies") and len(token) > 4:
            return token[:-3] + "y"
        if token.endswith(("sses", "ches", "shes", "xes", "zes", "oes")):
            return token[:-2]
        return token if token.endswith(("ss", "us", "is")) or not token.endswith("s") else token[:-1]


class Lexicon:
    """What the names of things mean, from the built-in table and, after it, the user's. A thing is one of its names.

    names: every name -> its thing; English ones as singular words with blanks between.
    """

    def __init__(self, grammar: Grammar, tables: list[dict[str, Any]]) -> None:
        self.grammar = grammar
        groups = [group for table in tables for group in table.get("synonyms", [])]
        parents = [pair for table in tables for pair in _pairs(table)]
        together = [group for table in tables for group in table.get("together", [])]
        commonplace = [name for table in tables for name in table.get("commonplace", [])]
        self.vague = frozenset(self.name(word) for table in tables for word in table.get("vague", []))
        mentioned = [[name] for group in [*parents, *together, commonplace] for name in group]
        self.names = _join_groups([[self.name(name) for name in group] for group in [*groups, *mentioned]])
        self.longest_chinese = max(len(name) for name in self.names if not name.isascii())
        self.joined = {name.replace(" ", ""): concept for name, concept in self.names.items() if " " in name}
        long_names = [name for name in self.names if name.isascii() and name.isalpha() and len(name) > 4]
        self._misspelled = {form: self.names[name] for name in reversed(long_names) for form in _shortened(name)}
        self._longest_slip = max(map(len, long_names)) + 1
        own = [self.name(name) for table in tables[1:] for group in table.get("synonyms", []) for name in group]
        self._parents: dict[str, set[str]] = defaultdict(set)
        self._children: dict[str, set[str]] = defaultdict(set)
        for parent, child in [*((self.concept(a), self.concept(b)) for a, b in parents), *self._parents_by_ending(own)]:
            self._parents[child].add(parent)
            self._children[parent].add(child)
        self._together = [frozenset(self.concept(name) for name in group) for group in together]
        self.commonplace = frozenset(self.concept(name) for name in commonplace)
        self._relatives: dict[str, frozenset[str]] = {}
        self._company: dict[str, frozenset[str]] = {}

    def name(self, word: str) -> str:
        """A name as it stands in `names`."""
        return " ".join(self.grammar.tokens(word))

    def concept(self, word: str) -> str:
        """The thing of a name that the tables hold."""
        return self.names[self.name(word)]

    def relatives(self, concepts: Iterable[str]) -> frozenset[str]:
        """The things themselves, all they are kinds of, and all that are kinds of them."""
        return frozenset[str]().union(*(self._relatives_of(concept) for concept in concepts))

    def company(self, concepts: Iterable[str]) -> frozenset[str]:
        """The relatives, and what is met together with these things or a kind of them."""
        return frozenset[str]().union(*(self._company_of(concept) for concept in concepts))

    def _relatives_of(self, concept: str) -> frozenset[str]:
        if concept not in self._relatives:
            self._relatives[concept] = _reach(concept, self._parents) | _reach(concept, self._children)
        return self._relatives[concept]

    def _company_of(self, concept: str) -> frozenset[str]:
        if concept not in self._company:
            kinds = _reach(concept, self._children)
            met = {other for group in self._together if not group.isdisjoint(kinds) for other in group}
            wider = [_reach(other, self._parents) | self._children.get(other, set()) for other in met]
            self._company[concept] = self._relatives_of(concept).union(*wider)
        return self._company[concept]

    def misspelled(self, word: str) -> str | None:
        """The thing whose name this is with one letter missing, added, changed or two exchanged."""
        if not 4 <= len(word) <= self._longest_slip:
            return None
        return next((self._misspelled[form] for form in _shortened(word) if form in self._misspelled), None)

    def _parents_by_ending(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """A police dog is a dog, 工程车 a 车."""
        pairs = []
        for name in names:
            parent = next((self.names[end] for end in _endings(name) if end in self.names), None)
            if parent:
                pairs.append((parent, self.names[name]))
        return pairs


@cache
def load_lexicon(path: Path | None) -> Lexicon:
    """The built-in words with those of a YAML file of the same form; raises DataError. Each file is read once."""
    folder = resources.files("cogvlm_ft.shards.negatives")
    grammar = Grammar(yaml.safe_load((folder / "grammar.yaml").read_text(encoding="utf-8")))
    tables = [yaml.safe_load((folder / "lexicon.yaml").read_text(encoding="utf-8"))]
    if path is not None:
        tables.append(_load_table(path))
    return Lexicon(grammar, tables)


def _load_table(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise DataError(f"synonyms {path} cannot be read: {error.strerror}; wanted a YAML file: {_FORM}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"synonyms {path} is no YAML: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"synonyms {path} holds {content!r:.80}, wanted {_FORM}")
    for key, value in content.items():
        if key in _LISTS_OF_LISTS:
            good = isinstance(value, list) and all(map(_are_names, value))
        elif key in _LISTS:
            good = _are_names(value)
        else:
            good = (
                key == "parents"
                and isinstance(value, dict)
                and _are_names(list(value))
                and all(map(_are_names, value.values()))
            )
        if not good:
            raise DataError(
                f'synonyms {path}: {key!r} is {value!r:.80}, wanted {_FORM}; quote words like "on" and "no"'
            )
    return content


def _pairs(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(parent, child) for parent, row in table.get("parents", {}).items() for child in row]


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and any(map(str.isalnum, name)) for name in value)


def _join_groups(groups: list[list[str]]) -> dict[str, str]:
    """Name -> thing, the first name of its group; groups that share a name are one."""
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
    """The shorter names it may end in, longest first."""
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
    """The word, and what is left of it without one of its letters: two words that share a form are alike."""
    return [word, *(word[:i] + word[i + 1 :] for i in range(len(word)))]
