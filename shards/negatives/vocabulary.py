"""Gather the phrases of a data set in one pass and constant memory: the source of absent targets."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import accumulate
from typing import Any

from cogvlm_ft.grounding.targets import Target
from cogvlm_ft.shards.negatives.lexicon import Lexicon
from cogvlm_ft.shards.negatives.meaning import Meaning, read_meaning
from cogvlm_ft.shards.negatives.photo import read_photo
from cogvlm_ft.shards.packing.candidates import Candidate

MAX_PHRASES = 50_000
MAX_PHRASE_LETTERS = 60
_MAX_UNKNOWN_WORDS = 10_000
_SHOWN_UNKNOWN_WORDS = 20


class BoundedCounts:
    """Exact counts of the `limit` texts with the lowest hashes, whatever the order of the texts."""

    def __init__(self, limit: int, counts: Iterable[tuple[str, int]] = ()) -> None:
        self._limit = limit
        self._counts: dict[str, int] = {}
        self._heap: list[tuple[int, str]] = []
        for text, count in counts:
            self.add(text, count)

    def add(self, text: str, count: int = 1) -> None:
        """Count a text. One that was dropped never returns: all kept texts have lower hashes."""
        if text in self._counts:
            self._counts[text] += count
            return
        item = -_hash(text), text
        if len(self._heap) < self._limit:
            heapq.heappush(self._heap, item)
        else:
            _, dropped = heapq.heappushpop(self._heap, item)
            if dropped == text:
                return
            del self._counts[dropped]
        self._counts[text] = count

    def items(self) -> list[tuple[str, int]]:
        """Return the counts, sorted by text."""
        return sorted(self._counts.items())


class Vocabulary:
    """Phrases by language with their counts, and the number of targets. Both passes need the same lexicon.

    exhaustive: every object that the data set has a name for is annotated in every image, as in detection data.
    """

    def __init__(self, lexicon: Lexicon, *, exhaustive: bool) -> None:
        self.lexicon = lexicon
        self.exhaustive = exhaustive
        self.totals: Counter[str] = Counter()
        self._phrases: dict[str, BoundedCounts] = {}
        self._unknown = BoundedCounts(_MAX_UNKNOWN_WORDS)
        self._drawn_from: dict[str, tuple[list[str], list[int]]] = {}

    def add(self, candidate: Candidate, others: Sequence[Candidate] = ()) -> None:
        """Add a candidate in pass 1: each one once, in any order. others: see `choose_absent`."""
        self._drawn_from.clear()
        present = [target for target in candidate.targets if target.boxes_xyxy]
        self.totals["present"] += len(present)
        self.totals["absent"] += len(candidate.targets) - len(present)
        is_background = self.is_background(candidate, others)
        photo = read_photo(candidate, others, self.exhaustive, self.lexicon) if present or is_background else None
        if isinstance(photo, str):
            self.totals[photo] += 1
        elif is_background:
            self.totals["background_photos"] += 1
        elif photo:
            self.totals["present_where_absent_can_be_added"] += len(present)
            self.totals["places"] += 1
        for target in present:
            self._add_phrase(target)

    def is_background(self, candidate: Candidate, others: Sequence[Candidate]) -> bool:
        """Return whether the image certainly shows nothing that the data set has a name for."""
        return self.exhaustive and all(each.is_background for each in (candidate, *others))

    def _add_phrase(self, target: Target) -> None:
        meaning = read_meaning(target.phrase, self.lexicon)
        reason = why_never_absent(target.phrase, meaning, self.exhaustive, self.lexicon)
        if reason:
            self.totals[reason] += 1
        else:
            self._phrases.setdefault(target.language, BoundedCounts(MAX_PHRASES)).add(target.phrase)
        if reason == "phrases_not_understood":
            for word in meaning.unknown:
                self._unknown.add(word[:MAX_PHRASE_LETTERS])

    def draw(self, language: str, share: float) -> str | None:
        """Return the phrase at this fraction (0..1) of the counts of the language, frequent ones more often."""
        if language not in self._drawn_from:
            counts = self._phrases[language].items() if language in self._phrases else []
            self._drawn_from[language] = [text for text, _ in counts], list(accumulate(count for _, count in counts))
        phrases, sums = self._drawn_from[language]
        return phrases[bisect_right(sums, int(share * sums[-1]))] if phrases else None

    def draw_language(self, share: float) -> str | None:
        """Return the language at this fraction (0..1) of the counts of all phrases; None without phrases."""
        languages = sorted(self._phrases)
        sums = list(accumulate(sum(count for _, count in self._phrases[name].items()) for name in languages))
        return languages[bisect_right(sums, int(share * sums[-1]))] if sums else None

    @property
    def num_phrases(self) -> int:
        """Return the number of distinct phrases that can be called absent."""
        return sum(len(counts.items()) for counts in self._phrases.values())

    def unknown_words(self) -> list[tuple[str, int]]:
        """Return the most frequent words that kept phrases from being used, for the user's list of synonyms."""
        return sorted(self._unknown.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN_UNKNOWN_WORDS]

    def to_json(self) -> dict[str, Any]:
        """Return the content; it does not depend on the order of the candidates."""
        return {
            "exhaustive": self.exhaustive,
            "totals": dict(sorted(self.totals.items())),
            "phrases": {language: self._phrases[language].items() for language in sorted(self._phrases)},
            "unknown_words": self._unknown.items(),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any], lexicon: Lexicon) -> Vocabulary:
        """Restore the content of `to_json`."""
        vocabulary = cls(lexicon, exhaustive=content["exhaustive"])
        vocabulary.totals.update(content["totals"])
        vocabulary._phrases = {name: BoundedCounts(MAX_PHRASES, items) for name, items in content["phrases"].items()}
        vocabulary._unknown = BoundedCounts(_MAX_UNKNOWN_WORDS, content["unknown_words"])
        return vocabulary


def why_never_absent(phrase: str, meaning: Meaning, exhaustive: bool, lexicon: Lexicon) -> str | None:
    """Return the reason why this phrase is never called absent from any image, or None."""
    negations = lexicon.grammar.negations
    chinese = any(word in phrase for word in negations["zh"])
    if chinese or not negations["en"].isdisjoint(lexicon.grammar.tokens(phrase)):
        return "phrases_with_a_negation"
    if len(phrase) > MAX_PHRASE_LETTERS:
        return "phrases_too_long"
    if exhaustive:
        return "phrases_without_a_thing" if meaning.vague or not meaning.content else None
    if not meaning.complete:
        return "phrases_not_understood"
    return "phrases_about_commonplace_things" if not lexicon.commonplace.isdisjoint(meaning.concepts) else None


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
