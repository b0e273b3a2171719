"""Add absent targets to a build in two passes: gather a vocabulary from all candidates, then choose per sample."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from cogvlm_ft.shards.negatives import NegativeSettings, Vocabulary, choose_absent, load_lexicon
from cogvlm_ft.shards.packing.checks import CheckedSample
from cogvlm_ft.shards.packing.label_names import LabelNames, load_names
from cogvlm_ft.shards.packing.staging import StagedSample, StagingDatabase, read_value

_VOCABULARY = "vocabulary"
_DETECTION = ("coco", "coco-xywh", "coco-xyxy", "voc", "yolo")
"""Formats in which every object of every class is annotated."""


@dataclass(frozen=True)
class SecondPass:
    """What a worker needs to choose absent targets. vocabulary_sha256: of the one in the staging database."""

    settings: NegativeSettings
    vocabulary_sha256: str


def is_exhaustive(settings: NegativeSettings, format_name: str) -> bool:
    """Return whether a class without annotation is absent from an image: by the chosen kinds, else by the format."""
    uses_classes, uses_phrases = settings.kinds.get("class", 0) > 0, settings.kinds.get("phrase", 0) > 0
    return uses_classes if uses_classes != uses_phrases else format_name in _DETECTION


def run_first_pass(
    staging: StagingDatabase, settings: NegativeSettings, *, exhaustive: bool
) -> tuple[Vocabulary, SecondPass]:
    """Gather the vocabulary of all candidates and store it in the staging database."""
    vocabulary = Vocabulary(load_lexicon(settings.synonyms, settings.names), exhaustive=exhaustive)
    for candidates, context in staging.by_image():
        for i, candidate in enumerate(candidates):
            vocabulary.add(candidate, [*candidates[:i], *candidates[i + 1 :], *context])
    content = vocabulary.to_json()
    staging.add_value(_VOCABULARY, content)
    return vocabulary, SecondPass(settings, hashlib.sha256(json.dumps(content).encode()).hexdigest())


def add_absent_targets(
    sample: CheckedSample, staged: StagedSample, staging: Path, second_pass: SecondPass, counts: Counter[str]
) -> CheckedSample:
    """Append absent targets to the sample. counts: is increased by kind."""
    settings = second_pass.settings
    vocabulary, names = _vocabulary(staging, second_pass.vocabulary_sha256, settings.synonyms, settings.names)
    chosen = choose_absent(staged.candidate, vocabulary, settings, counts, staged.others)
    if names:
        chosen = names.named(chosen)
    return replace(sample, record=replace(sample.record, targets=sample.record.targets + chosen))


@lru_cache(maxsize=1)  # a worker writes many shards
def _vocabulary(
    staging: Path, vocabulary_sha256: str, synonyms: Path | None, names: Path | None
) -> tuple[Vocabulary, LabelNames | None]:
    vocabulary = Vocabulary.from_json(read_value(staging, _VOCABULARY), load_lexicon(synonyms, names))
    return vocabulary, load_names(names) if names else None
