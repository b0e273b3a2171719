"""Which absent targets a photo gets: it depends on the seed, its name, what is said about it, and the vocabulary."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Target
from cogvlm_ft.shards.negatives.lexicon import load_lexicon
from cogvlm_ft.shards.negatives.meaning import read_meaning
from cogvlm_ft.shards.negatives.photo import Photo, read_photo
from cogvlm_ft.shards.negatives.swaps import swapped_phrases
from cogvlm_ft.shards.negatives.vocabulary import Vocabulary
from cogvlm_ft.shards.packing.candidates import Candidate

KINDS = ("class", "phrase", "attribute")
"""A class of the data set, if all of every class is annotated; a phrase of another photo, if not; and a phrase of this
photo with another colour, side or number."""

_MAX_SHARE = 0.9
_MOST_AT_ONE_PLACE = 3  # times what a photo would get if all could take some: too many questions show what they are
_DRAWS = 200


@dataclass(frozen=True)
class NegativeSettings:
    """share: of absent targets among all targets of the data set; 0 = none are added.

    kinds: how often each kind of KINDS is tried first; one with weight 0 is never made.
    synonyms: a YAML file of the user's in the form of lexicon.yaml, added to it.
    """

    share: float = 0.0
    kinds: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 1.0))
    synonyms: Path | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises DataError for a value that cannot be used, or a file that cannot be read."""
        if not 0 <= self.share <= _MAX_SHARE:
            raise DataError(f"negatives share is {self.share}, wanted 0 (none) to {_MAX_SHARE}")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown:
            raise DataError(f"negatives kinds has {', '.join(map(str, unknown))}; known are {', '.join(KINDS)}")
        good = all(0 <= weight < math.inf for weight in self.kinds.values())
        if not good or not any(self.kinds.values()):
            raise DataError(f"negatives kinds is {dict(self.kinds)}, wanted weights of 0 or more, not all of them 0")
        load_lexicon(self.synonyms)

    def signature(self) -> dict[str, Any]:
        """All that decides which targets are added, as JSON: the words by their hash, not by their path."""
        digest = hashlib.sha256()
        folder = resources.files("cogvlm_ft.shards.negatives")
        for data in ((folder / name).read_bytes() for name in ("lexicon.yaml", "grammar.yaml")):
            digest.update(data)
        if self.synonyms:
            digest.update(self.synonyms.read_bytes())
        kinds = {kind: float(self.kinds.get(kind, 0)) for kind in KINDS}
        return {"share": self.share, "kinds": kinds, "seed": self.seed, "words_sha256": digest.hexdigest()}


def choose_absent(
    candidate: Candidate,
    vocabulary: Vocabulary,
    settings: NegativeSettings,
    counts: Counter[str],
    others: Sequence[Candidate] = (),
) -> tuple[Target, ...]:
    """Absent targets for this photo, the same whatever the order of the photos and the number of workers.

    others: all other candidates of the same image: what they speak of is in the picture too.
    counts: is added to: targets by kind, and "missed", those for which nothing was found that is surely absent.
    """
    present = [target for target in candidate.targets if target.boxes_xyxy]
    draw = _draws(f"{settings.seed}:{candidate.key or candidate.image}")
    wanted = _number(len(present) * _absent_per_present(vocabulary, settings.share), draw())
    if not wanted:
        return ()
    photo = read_photo(candidate, others, vocabulary.exhaustive, vocabulary.lexicon)
    if isinstance(photo, str):
        return ()
    chosen = _choose(wanted, present, candidate, photo, vocabulary, settings, draw)
    counts.update(kind for _, kind in chosen)
    counts["missed"] += wanted - len(chosen)
    return tuple(target for target, _ in chosen)


def _absent_per_present(vocabulary: Vocabulary, share: float) -> float:
    """For each present target of a photo that can take absent ones, so that all photos together reach the share.

    Those of the user count; photos that cannot take any are made up for by the others, within limits.
    """
    totals = vocabulary.totals
    places = totals["present_where_absent_can_be_added"]
    plain = share / (1 - share)
    wanted = plain * totals["present"] - totals["absent"]
    return min(max(wanted, 0) / places, _MOST_AT_ONE_PLACE * plain) if places else 0.0


def _draws(name: str) -> Callable[[], float]:
    """Numbers in [0, 1) that the name alone decides; of `random` only what no version of Python changes."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()  # a file name may be no UTF-8
    return random.Random(int.from_bytes(digest, "big")).random


def _number(expected: float, draw: float) -> int:
    """A whole number that is `expected` on average."""
    return math.floor(expected) + (draw < expected % 1)


def _choose(
    wanted: int,
    present: Sequence[Target],
    candidate: Candidate,
    photo: Photo,
    vocabulary: Vocabulary,
    settings: NegativeSettings,
    draw: Callable[[], float],
) -> list[tuple[Target, str]]:
    """At most `wanted` targets with their kinds. A kind that has nothing left gives way to the others."""
    swaps = swapped_phrases(candidate, photo, vocabulary.lexicon) if settings.kinds.get("attribute") else []
    from_others = "class" if photo.exhaustive else "phrase"
    weights = {kind: settings.kinds.get(kind, 0) for kind in (from_others, "attribute")}
    chosen: list[tuple[Target, str]] = []
    taken: set[str] = set()
    while len(chosen) < wanted and any(weights.values()):
        first, second = weights.values()
        kind = from_others if draw() * (first + second) < first else "attribute"
        if kind == "attribute":
            target = swaps.pop(int(draw() * len(swaps))) if swaps else None
        else:
            language = present[int(draw() * len(present))].language  # or the language would tell what is absent
            target = _draw_absent(language, photo, vocabulary, taken, draw)
        if target is None:
            weights[kind] = 0
        elif (name := read_meaning(target.phrase, vocabulary.lexicon).whole) not in taken:
            taken.add(name)
            chosen.append((target, kind))
    return chosen


def _draw_absent(
    language: str, photo: Photo, vocabulary: Vocabulary, taken: set[str], draw: Callable[[], float]
) -> Target | None:
    """A phrase of the vocabulary of which this photo shows nothing."""
    lexicon = vocabulary.lexicon
    for _ in range(_DRAWS):
        phrase = vocabulary.draw(language, draw())
        if phrase is None:
            return None
        meaning = read_meaning(phrase, lexicon)
        if meaning.whole not in taken and not photo.may_show(meaning, lexicon):
            return Target(phrase, language, ())
    return None


def negatives_report(vocabulary: Vocabulary, settings: NegativeSettings, counts: Mapping[str, int]) -> dict[str, Any]:
    """For index.json: the share wanted and reached, counts by kind, and what stood in the way."""
    totals = vocabulary.totals
    num_added = sum(counts.get(kind, 0) for kind in KINDS)
    num_absent = totals["absent"] + num_added
    num_targets = totals["present"] + num_absent
    kept_out = {name: totals[name] for name in sorted(totals) if name.startswith(("phrases_", "photos_"))}
    return {
        "share_wanted": settings.share,
        "share_reached": round(num_absent / num_targets, 4) if num_targets else 0.0,
        "added": {kind: counts.get(kind, 0) for kind in KINDS},
        "missed": counts.get("missed", 0),
        **kept_out,
        "unknown_words": dict(vocabulary.unknown_words()),
    }
