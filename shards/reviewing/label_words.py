"""Labels of a source: those that differ in their spelling only, and a first version of their words for --names."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from cogvlm_ft.data.record import detect_language
from cogvlm_ft.shards.negatives.lexicon import Lexicon, load_lexicon
from cogvlm_ft.shards.reviewing.suspects import Suspect

MAX_LABELS = 1000
"""If there are more different phrases, they are descriptions and not labels."""
_BETWEEN_WORDS = re.compile(r"[\W_]+")
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9 _-]*|[\u4e00-\u9fff]+")
_YAML_WORDS = frozenset(["y", "n", "yes", "no", "on", "off", "true", "false", "null", "none"])
_HEAD = """\
# Words for the labels, for shards/build.py --names: label: [words in English and Chinese]
# A label with [] stays as it is. Check the words: they come from a general list.
# 标签的词语，用于 shards/build.py --names：标签: [英文和中文词语]。[] 表示标签不变。请核对，这些词来自通用词表。
"""


def spelling_suspects(labels: Mapping[str, int]) -> Iterator[Suspect]:
    """Yield a suspect for labels that differ in case, blanks or punctuation: they are probably one."""
    same: dict[str, list[str]] = defaultdict(list)
    for label in sorted(labels):
        same[_BETWEEN_WORDS.sub(" ", label).strip().casefold() or label].append(label)
    for plain, spellings in same.items():
        if len(spellings) > 1:
            names = ", ".join(f"{label!r} ({labels[label]})" for label in spellings)
            yield Suspect(f"source.label_spelling.{plain}", "label_spelling", "source", "", {"names": names})


def names_text(labels: Mapping[str, int]) -> str:
    """Return a file for --names with every label, the most frequent first, and known words in the other language.

    Words that several labels could have are left to the user.
    """
    lexicon = load_lexicon(None)
    words_of = {label: _words(label, lexicon) for label in labels}
    uses = Counter(word for label in labels for word in {each.casefold() for each in (label, *words_of[label])})
    lines = []
    for label in sorted(labels, key=lambda label: (-labels[label], label)):
        words = words_of[label]
        is_clear = len(words) > 1 and all(uses[word.casefold()] == 1 for word in (label, *words))
        listed = ", ".join(map(_scalar, words)) if is_clear else ""
        lines.append(f"{_scalar(label)}: [{listed}]  # {labels[label]}\n")
    return _HEAD + "".join(lines)


def _words(label: str, lexicon: Lexicon) -> list[str]:
    """Return the label as words, and its translation if the lexicon has one."""
    own = " ".join(_BETWEEN_WORDS.sub(" ", label).split()) or label
    concept = lexicon.names.get(lexicon.name(label))
    language = detect_language(label)
    others = (name for name, of in lexicon.names.items() if of == concept and detect_language(name) != language)
    translation = next(others, None) if concept else None
    return [own, translation] if translation else [own]


def _scalar(text: str) -> str:
    is_plain = _PLAIN.fullmatch(text) and text.strip() == text and text.casefold() not in _YAML_WORDS
    return text if is_plain else json.dumps(text, ensure_ascii=False)
