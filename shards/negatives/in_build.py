"""Absent targets in a build: a first pass over all candidates, then a choice for each sample where it is packed."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from cogvlm_ft.shards.negatives import NegativeSettings, Vocabulary, choose_absent, load_words
from cogvlm_ft.shards.packing.checks import CheckedSample
from cogvlm_ft.shards.packing.staging import Spool, Spooled, read_note

_VOCABULARY = "vocabulary"
_DETECTION = ("coco", "voc", "yolo")  # formats of data where every thing of every class is annotated


@dataclass(frozen=True)
class Absence:
    """What a worker needs to choose absent targets. vocabulary_sha256: of the one in the spool."""

    settings: NegativeSettings
    vocabulary_sha256: str


def is_exhaustive(settings: NegativeSettings, format_name: str) -> bool:
    """Is a class that is not annotated in a photo absent from it? The user says so by the kinds, or else the format."""
    wants_classes, wants_phrases = settings.kinds.get("class", 0) > 0, settings.kinds.get("phrase", 0) > 0
    return wants_classes if wants_classes != wants_phrases else format_name in _DETECTION


def gather_vocabulary(spool: Spool, settings: NegativeSettings, exhaustive: bool) -> tuple[Vocabulary, Absence]:
    """The first pass; leaves the vocabulary in the spool."""
    vocabulary = Vocabulary(load_words(settings.synonyms), exhaustive=exhaustive)
    for kept, remembered in spool.photos():
        for i, candidate in enumerate(kept):
            vocabulary.add(candidate, [*kept[:i], *kept[i + 1 :], *remembered])
    content = vocabulary.to_json()
    spool.note(_VOCABULARY, content)
    return vocabulary, Absence(settings, hashlib.sha256(json.dumps(content).encode()).hexdigest())


def with_absent(
    sample: CheckedSample, spooled: Spooled, spool: Path, absence: Absence, counts: Counter[str]
) -> CheckedSample:
    """The sample with its absent targets after its own. counts: is added to."""
    vocabulary = _vocabulary(spool, absence.vocabulary_sha256, absence.settings.synonyms)
    chosen = choose_absent(spooled.candidate, vocabulary, absence.settings, counts, spooled.others)
    return replace(sample, record=replace(sample.record, targets=sample.record.targets + chosen))


@lru_cache(maxsize=1)  # a worker packs many shards
def _vocabulary(spool: Path, vocabulary_sha256: str, synonyms: Path | None) -> Vocabulary:
    return Vocabulary.from_json(read_note(spool, _VOCABULARY), load_words(synonyms))
