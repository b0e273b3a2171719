"""Results by phrase, and which phrase's boxes were given for which; NumPy only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from cogvlm_ft.grounding.metrics import AnswerScore, summarize
from cogvlm_ft.grounding.overlap import pairwise_iou
from cogvlm_ft.grounding.prediction import Prediction
from cogvlm_ft.grounding.protocols import OURS, Protocol
from cogvlm_ft.grounding.targets import Box

SAME_BOX = 0.5
"""Minimum IoU at which an answered box counts as showing an object."""
NOTHING = ""
"""Used instead of a phrase for a box that shows no annotated object."""


@dataclass
class Confusion:
    """Boxes answered for the phrase `asked` that show an object of the phrase `given`, or NOTHING.

    num_answered: all boxes answered for `asked`. keys: of the images, in the order of the data.
    """

    asked: str
    given: str
    num_boxes: int = 0
    num_answered: int = 0
    keys: list[str] = field(default_factory=list)


def metrics_by_phrase(predictions: Sequence[Prediction], protocol: Protocol = OURS) -> dict[str, dict[str, float]]:
    """Return the metrics of each phrase that was asked for, those asked for most often first."""
    scores: dict[str, list[AnswerScore]] = {}
    for each in predictions:
        if each.phrase and each.score is not None:
            scores.setdefault(each.phrase, []).append(each.score)
    ranked = sorted(scores, key=lambda phrase: -len(scores[phrase]))  # ties stay in the order of the data
    return {phrase: summarize(scores[phrase], protocol) for phrase in ranked}


def find_confusions(predictions: Sequence[Prediction]) -> list[Confusion]:
    """Return what wrong boxes show, the most frequent first.

    A box that shows an object of its own phrase is not counted, also where another phrase has the same object.
    """
    asked_of: dict[str, list[Prediction]] = {}
    for each in predictions:
        if each.phrase and each.truth_boxes_xyxy is not None:
            asked_of.setdefault(each.key, []).append(each)
    found: dict[tuple[str, str], Confusion] = {}
    num_answered: Counter[str] = Counter()
    for key, asked in asked_of.items():
        objects = [(other.phrase, box) for other in asked for box in other.truth_boxes_xyxy or ()]
        for each in asked:
            boxes = each.boxes_xyxy or []
            num_answered[each.phrase] += len(boxes)
            for given in (_shown(box, each.truth_boxes_xyxy or [], objects) for box in boxes):
                if given is not None:
                    confusion = found.setdefault((each.phrase, given), Confusion(each.phrase, given))
                    confusion.num_boxes += 1
                    if key not in confusion.keys:
                        confusion.keys.append(key)
    for confusion in found.values():
        confusion.num_answered = num_answered[confusion.asked]
    return sorted(found.values(), key=lambda confusion: -confusion.num_boxes)


def _shown(box: Box, own: Sequence[Box], objects: Sequence[tuple[str, Box]]) -> str | None:
    """Return the phrase of the object that a box shows best, NOTHING for none; None if it is one of its own."""
    if own and pairwise_iou([box], own).max() >= SAME_BOX:
        return None
    if not objects:
        return NOTHING
    overlaps = pairwise_iou([box], [each for _, each in objects])[0]
    best = int(overlaps.argmax())
    return objects[best][0] if overlaps[best] >= SAME_BOX else NOTHING
