"""Choose the absent targets of an image; they depend on the seed, its name, its annotations and the vocabulary."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Target
from cogvlm_ft.shards.negatives.lexicon import load_lexicon
from cogvlm_ft.shards.negatives.meaning import read_meaning
from cogvlm_ft.shards.negatives.photo import Photo, read_photo
from cogvlm_ft.shards.negatives.swaps import swapped_phrases
from cogvlm_ft.shards.negatives.vocabulary import Vocabulary
from cogvlm_ft.shards.packing.candidates import Candidate

KINDS = ("class", "phrase", "attribute")
"""class: of the data set, if every object of every class is annotated. phrase: of another image, otherwise.
attribute: a phrase of this image with another colour, side or number."""

_MAX_SHARE = 0.9
_MOST_AT_ONE_PLACE = 3  # times the average: more would reveal which images have absent targets
_MOST_IN_BACKGROUND = 0.75
_DRAWS = 200


@dataclass(frozen=True)
class NegativeSettings:
    """share: fraction of absent targets among all targets of the data set; 0 adds none.

    kinds: weights by which a kind of KINDS is tried first; weight 0 disables it.
    synonyms: the user's YAML file in the form of lexicon.yaml, added to it.
    names: the user's words for labels.
    """

    share: float = 0.0
    kinds: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 1.0))
    synonyms: Path | None = None
    seed: int = 0
    names: Path | None = None

    def check(self) -> None:
        """Raise DataError for an unusable value, or a file that cannot be read."""
        if not 0 <= self.share <= _MAX_SHARE:
            raise DataError(f"--negatives: found {self.share}; expected 0 (none) to {_MAX_SHARE}")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown:
            raise DataError(f"--negative-kinds: unknown {', '.join(map(str, unknown))}; expected {', '.join(KINDS)}")
        good = all(0 <= weight < math.inf for weight in self.kinds.values())
        if not good or not any(self.kinds.values()):
            raise DataError(f"--negative-kinds: {dict(self.kinds)}; expected weights of 0 or more, not all of them 0")
        load_lexicon(self.synonyms, self.names)

    def signature(self) -> dict[str, Any]:
        """Return everything that determines the added targets, as JSON; the lexicon by its hash, not by its path."""
        digest = hashlib.sha256()
        folder = resources.files("cogvlm_ft.shards.negatives")
        for data in ((folder / name).read_bytes() for name in ("lexicon.yaml", "grammar.yaml")):
            digest.update(data)
        for path in (self.synonyms, self.names):
            digest.update(path.read_bytes() if path else b"")
        kinds = {kind: float(self.kinds.get(kind, 0)) for kind in KINDS}
        return {"share": self.share, "kinds": kinds, "seed": self.seed, "words_sha256": digest.hexdigest()}


def choose_absent(
    candidate: Candidate,
    vocabulary: Vocabulary,
    settings: NegativeSettings,
    counts: Counter[str],
    others: Sequence[Candidate] = (),
) -> tuple[Target, ...]:
    """Return absent targets for this image, independent of the order of the images and the number of workers.

    others: all other candidates of the same image: what they speak of is in the picture too.
    counts: is added to: targets by kind, and "missed", those for which nothing was found that is surely absent.
    """
    present = [target for target in candidate.targets if target.boxes_xyxy]
    draw = _draws(f"{settings.seed}:{candidate.key or candidate.image}")
    plan = plan_absent(vocabulary, settings)
    is_background = vocabulary.is_background(candidate, others)
    num_targets = _number(plan.per_background if is_background else len(present) * plan.per_present, draw())
    if not num_targets:
        return ()
    photo = read_photo(candidate, others, vocabulary.exhaustive, vocabulary.lexicon)
    if isinstance(photo, str):
        return ()
    chosen = _choose(num_targets, present, candidate, photo, vocabulary, settings, draw)
    counts.update(kind for _, kind in chosen)
    counts["missed"] += num_targets - len(chosen)
    counts["background_used"] += is_background and bool(chosen)
    return tuple(target for target, _ in chosen)


class AbsentPlan(NamedTuple):
    """How many absent targets to add: in total, per present target of an image, and per image without annotations."""

    num_needed: float
    per_present: float
    per_background: float

    def num_planned(self, totals: Mapping[str, int]) -> float:
        """Return how many are tried."""
        places = totals.get("present_where_absent_can_be_added", 0)
        return self.per_present * places + self.per_background * totals.get("background_photos", 0)


def plan_absent(vocabulary: Vocabulary, settings: NegativeSettings) -> AbsentPlan:
    """Return how many absent targets to add, to reach the fraction.

    Those of the user count. Images without annotations come first: each gets at least one, but together at most three
    quarters, or an image without objects would be the only one with absent targets. Other images that cannot take any
    are made up for by the others, within limits.
    """
    totals = vocabulary.totals
    places, background = totals["present_where_absent_can_be_added"], totals["background_photos"]
    plain = settings.share / (1 - settings.share)
    num_needed = max(plain * totals["present"] - totals["absent"], 0)
    per_background = 0.0
    if background and num_needed and settings.kinds.get("class", 0) > 0:
        mean = places / totals["places"] if places else 1.0
        most = max(1.0, num_needed * (_MOST_IN_BACKGROUND if places else 1)) / background
        per_background = min(max(1.0, plain * mean), most)
    rest = max(num_needed - per_background * background, 0)
    per_present = min(rest / places, _MOST_AT_ONE_PLACE * plain) if places else 0.0
    return AbsentPlan(num_needed, per_present, per_background)


def _draws(name: str) -> Callable[[], float]:
    """Return a generator of numbers in [0, 1) seeded by the name; `random()` is stable in all Python versions."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()  # a file name may not be valid UTF-8
    return random.Random(int.from_bytes(digest, "big")).random


def _number(expected: float, draw: float) -> int:
    """Round to a whole number that equals `expected` on average."""
    return math.floor(expected) + (draw < expected % 1)


def _choose(
    num_targets: int,
    present: Sequence[Target],
    candidate: Candidate,
    photo: Photo,
    vocabulary: Vocabulary,
    settings: NegativeSettings,
    draw: Callable[[], float],
) -> list[tuple[Target, str]]:
    """Return at most `num_targets` targets with their kinds. An exhausted kind gives way to the others."""
    swaps = swapped_phrases(candidate, photo, vocabulary.lexicon) if settings.kinds.get("attribute") else []
    from_others = "class" if photo.exhaustive else "phrase"
    weights = {kind: settings.kinds.get(kind, 0) for kind in (from_others, "attribute")}
    chosen: list[tuple[Target, str]] = []
    taken: set[str] = set()
    while len(chosen) < num_targets and any(weights.values()):
        first, second = weights.values()
        kind = from_others if draw() * (first + second) < first else "attribute"
        if kind == "attribute":
            target = swaps.pop(int(draw() * len(swaps))) if swaps else None
        else:
            language = _language(present, vocabulary, draw)
            target = _draw_absent(language, photo, vocabulary, taken, draw) if language else None
        if target is None:
            weights[kind] = 0
        elif (name := read_meaning(target.phrase, vocabulary.lexicon).whole) not in taken:
            taken.add(name)
            chosen.append((target, kind))
    return chosen


def _language(present: Sequence[Target], vocabulary: Vocabulary, draw: Callable[[], float]) -> str | None:
    """Draw the language of a present target, or the language would tell what is absent; else one of the data set."""
    return present[int(draw() * len(present))].language if present else vocabulary.draw_language(draw())


def _draw_absent(
    language: str, photo: Photo, vocabulary: Vocabulary, taken: set[str], draw: Callable[[], float]
) -> Target | None:
    """Draw a phrase of the vocabulary that this image certainly does not show."""
    lexicon = vocabulary.lexicon
    for _ in range(_DRAWS):
        phrase = vocabulary.draw(language, draw())
        if phrase is None:
            return None
        meaning = read_meaning(phrase, lexicon)
        if meaning.whole not in taken and not photo.may_show(meaning, lexicon):
            return Target(phrase, language, ())
    return None
