"""Score an answer: the overlap of its boxes with the true ones, and whether a not-found sentence is right."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cogvlm_ft.grounding.overlap import (
    centre_inside,
    count_matched,
    count_matched_greedily,
    match_best,
    pairwise_ciou,
    pairwise_diou,
    pairwise_giou,
    pairwise_iou,
)
from cogvlm_ft.grounding.protocols import OURS, Protocol
from cogvlm_ft.grounding.targets import Box

PRESENT, ABSENT, TEXT = "present", "absent", "text"
HIT, THRESHOLDS = 0.5, (0.5, 0.75, 0.9)
AVERAGED = "ema_"
"""Prefix of metrics of averaged weights (`train.ema`), such as ema_mean_iou."""
_LOWER_IS_BETTER = frozenset({"false_not_found", "unreadable", "truncated", "empty_answers", "num_bad"})
LOWER_IS_BETTER = _LOWER_IS_BETTER | {AVERAGED + name for name in _LOWER_IS_BETTER}
"""Metrics for which lower is better. The others are better if higher, or do not measure quality."""


@dataclass(frozen=True)
class AnswerScore:
    """The score of one answer.

    kind: "present" (the image contains at least one true box), "absent" (none), "text" (a turn without boxes).
    iou: see `match_iou`; 0 for an unreadable answer or a not-found sentence; defined for "present" only.
    readable: the answer has readable boxes or is a not-found sentence; always true for "text".
    said_not_found: the answer is exactly a not-found sentence.
    exact: the answer equals the true text; defined for "text" only.
    giou, diou, ciou, centre: of the pairs of `match_iou`, divided by the size of the larger set; a box without a
        partner counts as -1 (centre: as 0). centre is the fraction of boxes whose centre is inside their true box.
    num_answered, num_true, num_cut: boxes; num_cut of the true ones need not be named.
    num_hits: the size of the largest matching of answered and true boxes with IoU 0.5 or more.
    all_found: no box is missing and none is superfluous, with an optimal matching at IoU 0.5 or more.
    all_found_greedy_iou, all_found_greedy_giou: the same with greedy matching by IoU or GIoU.
    """

    kind: str
    iou: float = 0.0
    readable: bool = True
    said_not_found: bool = False
    exact: bool = False
    giou: float = -1.0
    diou: float = -1.0
    ciou: float = -1.0
    centre: float = 0.0
    num_answered: int = 0
    num_true: int = 0
    num_cut: int = 0
    num_hits: int = 0
    all_found: bool = False
    all_found_greedy_iou: bool = False
    all_found_greedy_giou: bool = False


def match_iou(predicted_xyxy: ArrayLike, truth_xyxy: ArrayLike, num_optional: int = 0) -> float:
    """Return one IoU for two sets of boxes: the sum of the IoUs of the optimal matching / size of the larger set.

    Both a missing and a superfluous box lower it. With one box on each side this is their plain IoU. Any `num_optional`
    of the true boxes may be missing.
    """
    iou = pairwise_iou(predicted_xyxy, truth_xyxy)
    num_predicted, num_true = iou.shape
    return float(iou[match_best(iou)].sum() / max(num_predicted, num_true - num_optional))


def score_answer(
    answer_text: str,
    truth_boxes_xyxy: Sequence[Box] | None,
    image_size_px: tuple[int, int],
    not_found: Collection[str],
    truth_text: str | None = None,
    num_cut_boxes: int = 0,
    protocol: Protocol = OURS,
) -> AnswerScore:
    """Score the answer to one turn.

    truth_boxes_xyxy: pixels; empty = the target is absent; None = a verbatim turn without boxes: pass `truth_text`.
    not_found: the not-found sentences that count (`Wording.not_found_sentences`).
    num_cut_boxes: how many of the true boxes, no matter which, need not be named because the list of boxes was cut.
    """
    answer = answer_text.strip()
    if truth_boxes_xyxy is None:
        if truth_text is None:
            raise ValueError("a turn without boxes is scored by its text: pass truth_text")
        return AnswerScore(TEXT, exact=answer == truth_text.strip())
    said_not_found = answer in {sentence.strip() for sentence in not_found}
    boxes = None if said_not_found else protocol.read(answer, image_size_px)
    return score_boxes(boxes, said_not_found, truth_boxes_xyxy, num_cut_boxes, protocol, image_size_px)


def score_boxes(
    boxes: Sequence[Box] | None,
    said_not_found: bool,
    truth_boxes_xyxy: Sequence[Box],
    num_cut_boxes: int = 0,
    protocol: Protocol = OURS,
    image_size_px: tuple[int, int] = (1, 1),
) -> AnswerScore:
    """Score the boxes that an answer was read as, in pixels. None: it was unreadable, or said "not found"."""
    readable = said_not_found or boxes is not None
    truth = protocol.truth(truth_boxes_xyxy, image_size_px)
    if truth:
        return _score_boxes(boxes or [], truth, num_cut_boxes, readable, said_not_found, protocol.strict)
    nothing = not boxes
    return AnswerScore(
        ABSENT,
        readable=readable,
        said_not_found=said_not_found,
        num_answered=len(boxes or ()),
        all_found=nothing,
        all_found_greedy_iou=nothing,
        all_found_greedy_giou=nothing,
    )


def _score_boxes(
    boxes: Sequence[Box], truth: Sequence[Box], num_cut: int, readable: bool, said_not_found: bool, strict: bool
) -> AnswerScore:
    """Score the boxes of an answer against at least one true box."""
    num_cut = min(num_cut, len(truth) - 1)
    iou, giou = pairwise_iou(boxes, truth), pairwise_giou(boxes, truth)
    pairs = match_best(iou)
    size = max(len(boxes), len(truth) - num_cut)
    num_alone = size - len(pairs[0])

    def mean(overlap: ArrayLike, alone: float) -> float:
        return float((np.asarray(overlap)[pairs].sum() + alone * num_alone) / size)

    def is_all(num_matched: int) -> bool:
        return num_matched == len(boxes) >= len(truth) - num_cut

    num_hits = count_matched(iou, HIT, strict=strict)
    return AnswerScore(
        PRESENT,
        iou=mean(iou, 0.0),
        readable=readable,
        said_not_found=said_not_found,
        giou=mean(giou, -1.0),
        diou=mean(pairwise_diou(boxes, truth), -1.0),
        ciou=mean(pairwise_ciou(boxes, truth), -1.0),
        centre=mean(centre_inside(boxes, truth), 0.0),
        num_answered=len(boxes),
        num_true=len(truth),
        num_cut=num_cut,
        num_hits=num_hits,
        all_found=is_all(num_hits),
        all_found_greedy_iou=is_all(count_matched_greedily(iou, HIT)),
        all_found_greedy_giou=is_all(count_matched_greedily(giou, HIT)),
    )


def summarize(scores: Sequence[AnswerScore], protocol: Protocol = OURS) -> dict[str, float]:
    """Average over many answers; a key without any value is left out. docs/metrics.md explains each."""
    present = [score for score in scores if score.kind == PRESENT]
    absent = [score for score in scores if score.kind == ABSENT]
    text = [score for score in scores if score.kind == TEXT]
    both = present + absent
    shares: dict[str, list[float]] = {
        "mean_iou": [score.iou for score in present],
        **{f"acc@{t:g}": [_reaches(score.iou, t, protocol.strict) for score in present] for t in THRESHOLDS},
        "mean_giou": [score.giou for score in present],
        "mean_diou": [score.diou for score in present],
        "mean_ciou": [score.ciou for score in present],
        "centre_acc": [score.centre for score in present],
        "false_not_found": [score.said_not_found for score in present],
        "not_found_acc": [score.said_not_found for score in absent],
        "t_acc": [score.num_answered > 0 for score in present],
        "n_acc": [score.num_answered == 0 for score in absent],
        "unreadable": [not score.readable for score in both],
        "text_exact": [score.exact for score in text],
    }
    if protocol.every_box:
        shares |= {
            "count_acc": [_counts_right(score) for score in both],
            "grec_f1_iou": [score.all_found_greedy_iou for score in both],
            "grec_f1_giou_official": [score.all_found_greedy_giou for score in both],
            "grec_f1_optimal": [score.all_found for score in both],
        }
    counts = {"num_present": float(len(present)), "num_absent": float(len(absent)), "num_text": float(len(text))}
    sets = _set_scores(both) if protocol.every_box else {}
    return {key: float(np.mean(values)) for key, values in shares.items() if values} | sets | counts


def _reaches(iou: float, threshold: float, strict: bool) -> bool:
    return iou > threshold if strict else iou >= threshold


def _counts_right(score: AnswerScore) -> bool:
    """Return whether the number of boxes is right; no boxes are right only as a not-found sentence.

    A list that was cut may be shorter.
    """
    if score.num_answered == 0:
        return score.kind == ABSENT and score.said_not_found
    return score.num_true - score.num_cut <= score.num_answered <= score.num_true


def _set_scores(scores: Sequence[AnswerScore]) -> dict[str, float]:
    """Compute precision, recall and F1 of all boxes together; true boxes that were cut do not count as missed."""
    num_hits = sum(score.num_hits for score in scores)
    num_answered = sum(score.num_answered for score in scores)
    num_expected = sum(max(score.num_hits, score.num_true - score.num_cut) for score in scores)
    parts = {
        "precision@0.5": (num_hits, num_answered),
        "recall@0.5": (num_hits, num_expected),
        "f1@0.5": (2 * num_hits, num_answered + num_expected),
    }
    return {key: above / below for key, (above, below) in parts.items() if below}


def is_lower_better(name: str) -> bool:
    """Return whether a lower value is better, for a metric with or without its `/group=value`."""
    return name.partition("/")[0] in LOWER_IS_BETTER
