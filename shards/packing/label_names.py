"""Words for the labels of a data set: a YAML file of `label: [words in English and Chinese]`.

RBC: [red blood cell, erythrocyte, 红细胞]
Platelets: 血小板

The annotations stay as they are. A question in one language asks with one of the words in that language, or with the
label if there is none and the label is in that language. Labels with the same words become one target; a label without
words, or one that the file does not have, stays as it is.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import yaml

from cogvlm_ft.data.record import detect_language
from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Target
from cogvlm_ft.plain_files import read_bytes
from cogvlm_ft.shards.formats.encodings import decode_text
from cogvlm_ft.shards.packing.candidates import Candidate, Problem, Rejected
from cogvlm_ft.yaml_text import MAX_BYTES, compose_yaml

_EXPECTED = "expected label: [words], such as RBC: [red blood cell, 红细胞]"
_MAX_SEEN = 1000


class LabelNames:
    """The words of each label. words_of: by label, as `plain_label` writes it; path: for messages."""

    def __init__(self, words_of: dict[str, tuple[str, ...]], path: Path) -> None:
        self._path = path
        self._words_of = words_of
        self._names_of = {
            label: tuple((detect_language(word), word) for word in words) for label, words in words_of.items() if words
        }
        self._owner = _owners(words_of, path)

    def synonyms(self) -> list[list[str]]:
        """Return the label and its words, of each label that names something, for the lexicon."""
        groups = [[label, *words] for label, words in self._words_of.items() if words]
        return [named for group in groups if (named := [word for word in group if any(map(str.isalnum, word))])]

    def apply(self, parts: Iterable[Candidate | Problem]) -> Iterator[Candidate | Problem]:
        """Yield the same parts, with their names, then a note for each label that no target has. Raises DataError."""
        unmet, others = dict(self._names_of), set[str]()
        for part in parts:
            if isinstance(part, Problem):
                yield part
                continue
            for target in part.targets:
                label = plain_label(target.phrase)
                if label not in self._names_of and len(others) < _MAX_SEEN:
                    others.add(label)
                unmet.pop(label, None)
            yield replace(part, targets=self.named(part.targets))
        for label in unmet:
            near = get_close_matches(label, sorted(others), n=1, cutoff=0.5)
            hint = f"; similar: {near[0]!r}" if near else ""
            detail = f"no target has the label {label!r}{hint}. Correct the label in the file, or remove it."
            yield Problem("note", "name_without_label", detail, self._path.name)

    def named(self, targets: Iterable[Target]) -> tuple[Target, ...]:
        """Return the targets with their names; those with the same names are one target. Raises DataError."""
        found: dict[object, Target] = {}
        for number, target in enumerate(targets):
            label = plain_label(target.phrase)
            names = self._names_of.get(label, ())
            if not names:
                self._check_own_label(label)
            key = frozenset(names) if names and target.description is None else number
            first = found.get(key)
            boxes = (*first.boxes_xyxy, *target.boxes_xyxy) if first else target.boxes_xyxy
            found[key] = replace(first or target, boxes_xyxy=boxes, names=names)
        return tuple(found.values())

    def _check_own_label(self, label: str) -> None:
        """Raise DataError if a label without words is a word of another one: one question would have two answers."""
        owner = self._owner.get(label.casefold(), label)
        if owner != label and self._words_of[owner]:
            advice = f"Add {label!r} to the file with other words, or with the same ones to make both one target."
            raise DataError(f"--names {self._path}: {label!r} is a word of {owner!r} and a label of its own. {advice}")


def load_names(path: Path) -> LabelNames:
    """Load the file. Raises DataError that names the label."""
    try:
        node = compose_yaml(decode_text(read_bytes(path, MAX_BYTES)).text)
    except OSError as error:
        raise DataError(f"--names {path}: {error.strerror}; expected a YAML file") from None
    except (Rejected, ValueError) as error:
        raise DataError(f"--names {path}: not valid YAML: {error}; {_EXPECTED}") from None
    if not isinstance(node, yaml.MappingNode):
        raise DataError(f"--names {path}: no labels; {_EXPECTED}")
    words_of: dict[str, tuple[str, ...]] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise DataError(f"--names {path}, line {key.start_mark.line + 1}: no label; {_EXPECTED}")
        label = plain_label(key.value)
        if label in words_of:
            raise DataError(f"--names {path}: {label!r} is there twice; expected it once, with all its words")
        words_of[label] = _words(label, value, path)
    return LabelNames(words_of, path)


def plain_label(text: str) -> str:
    """Return the label with single blanks, in one Unicode form."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _words(label: str, node: yaml.Node, path: Path) -> tuple[str, ...]:
    """Return the words of a label, a list or one word, as they are written: no and 1 are words."""
    entries = node.value if isinstance(node, yaml.SequenceNode) else [node]
    words: list[str] = []
    for entry in entries:
        text = plain_label(entry.value) if isinstance(entry, yaml.ScalarNode) else None
        if text is None or "[[" in text or "]]" in text:
            raise DataError(f"--names {path}: {label!r} has {entry.value!r:.80}; {_EXPECTED}")
        is_null = entry.tag == "tag:yaml.org,2002:null"
        words += [text] if text and not is_null else []
    if words and detect_language(label) not in map(detect_language, words):
        words.append(label)
    return tuple(dict.fromkeys(words))


def _owners(words_of: dict[str, tuple[str, ...]], path: Path) -> dict[str, str]:
    """Return the label of each word. Raises DataError if labels share some of their words, but not all."""
    owner: dict[str, str] = {}
    for label, words in words_of.items():
        for word in words or (label,):
            other = owner.setdefault(word.casefold(), label)
            if set(words_of[other]) != set(words):
                advice = "Give each label its own words, or the same ones to make both one target."
                raise DataError(f"--names {path}: {word!r} is a word of {other!r} and of {label!r}. {advice}")
    return owner
