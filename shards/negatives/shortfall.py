"""Report how many absent targets were added, and why fewer than requested."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cogvlm_ft.shards.negatives.absent import KINDS, NegativeSettings, plan_absent
from cogvlm_ft.shards.negatives.vocabulary import Vocabulary

_ROUNDING = 0.005
_MOST_WORDS = 5


def negatives_report(vocabulary: Vocabulary, settings: NegativeSettings, counts: Mapping[str, int]) -> dict[str, Any]:
    """Return the entry for index.json: requested and reached fraction, counts by kind, and what was left out."""
    totals = vocabulary.totals
    num_added = sum(counts.get(kind, 0) for kind in KINDS)
    num_absent = totals["absent"] + num_added
    num_targets = totals["present"] + num_absent
    reached = round(num_absent / num_targets, 4) if num_targets else 0.0
    kept_out = {name: totals[name] for name in sorted(totals) if name.startswith(("phrases_", "photos_"))}
    return {
        "share_requested": settings.share,
        "share_reached": reached,
        "added": {kind: counts.get(kind, 0) for kind in KINDS},
        "missed": counts.get("missed", 0),
        "background_photos": totals["background_photos"],
        "background_used": counts.get("background_used", 0),
        "why_fewer": _reasons(vocabulary, settings, counts) if reached < settings.share - _ROUNDING else [],
        **kept_out,
        "unknown_words": dict(vocabulary.unknown_words()),
    }


def _reasons(vocabulary: Vocabulary, settings: NegativeSettings, counts: Mapping[str, int]) -> list[str]:
    """Return for people, in numbers, why fewer absent targets were added than requested."""
    totals, plan = vocabulary.totals, plan_absent(vocabulary, settings)
    num_added = sum(counts.get(kind, 0) for kind in KINDS)
    reasons = [f"{round(plan.num_needed)} were needed, {num_added} added"]
    too_many = round(plan.num_needed - plan.num_planned(totals))
    num_able = totals["places"] + totals["background_photos"]
    if not num_able:
        reasons.append("no photo can take any")
    elif too_many > 0:
        places = f"{_counted(num_able, 'photo')} that can take some"
        reasons.append(f"{too_many} are too many for the {places}: the other photos would have none")
    if counts.get("missed", 0):
        names = _counted(vocabulary.num_phrases, "usable name")
        reasons.append(f"{counts['missed']} found nothing that is certainly absent among {names}")
    by_chance = round(plan.num_planned(totals)) - num_added - counts.get("missed", 0)
    if by_chance > 0:
        reasons.append(f"{by_chance} fewer by chance: the number for each photo is drawn")
    reasons += [f"{_counted(totals[name], 'photo')} {text}" for name, text in _PHOTOS.items() if totals[name]]
    reasons += [f"{_counted(totals[name], 'phrase')} {text}" for name, text in _PHRASES.items() if totals[name]]
    words = [word for word, _ in vocabulary.unknown_words()[:_MOST_WORDS]]
    if words:
        reasons.append(f"unknown words such as {', '.join(words)}: give their meaning with --names or --synonyms")
    return reasons


_PHOTOS = {
    "photos_with_losses": "had annotations that could not be read, so what they show is not known",
    "photos_not_understood": "have phrases whose meaning is not known",
}
_PHRASES = {
    "phrases_not_understood": "have an unknown meaning and are never called absent",
    "phrases_about_commonplace_things": "name commonplace things, which may be there without annotation",
    "phrases_too_long": "are too long",
    "phrases_with_a_negation": "have a negation",
    "phrases_without_a_thing": "name no object",
}


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
