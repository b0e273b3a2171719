"""How good an answer is: IoU of its boxes, and whether "not found" was said when it should be."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment

from cogvlm_ft.grounding.boxes import boxes_from_bins, parse_boxes
from cogvlm_ft.grounding.targets import Box

PRESENT, ABSENT, TEXT = "present", "absent", "text"


@dataclass(frozen=True)
class AnswerScore:
    """The score of one answer.

    kind: "present" (the picture holds at least one true box), "absent" (it holds none), "text" (a turn without boxes).
    iou: see `match_iou`; 0 for an unreadable answer or a "not found"; meaningful for "present" only.
    readable: the answer has readable boxes or is a not-found sentence; always true for "text".
    said_not_found: the answer is exactly a not-found sentence.
    exact: the answer is the true text, word for word; meaningful for "text" only.
    """

    kind: str
    iou: float = 0.0
    readable: bool = True
    said_not_found: bool = False
    exact: bool = False


def pairwise_iou(a_xyxy: ArrayLike, b_xyxy: ArrayLike) -> NDArray[np.float64]:
    """IoU of every box of a with every box of b: [P, 4], [G, 4] -> [P, G]. Inverted or empty boxes have IoU 0."""
    a = np.asarray(a_xyxy, dtype=np.float64).reshape(-1, 1, 4)
    b = np.asarray(b_xyxy, dtype=np.float64).reshape(1, -1, 4)
    top_left = np.maximum(a[..., :2], b[..., :2])
    bottom_right = np.minimum(a[..., 2:], b[..., 2:])
    overlap = _area(top_left, bottom_right)
    union = _area(a[..., :2], a[..., 2:]) + _area(b[..., :2], b[..., 2:]) - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def _area(top_left: NDArray[np.float64], bottom_right: NDArray[np.float64]) -> NDArray[np.float64]:
    sides: NDArray[np.float64] = np.clip(bottom_right - top_left, 0, None)
    return sides[..., 0] * sides[..., 1]


def match_iou(predicted_xyxy: ArrayLike, truth_xyxy: ArrayLike, num_optional: int = 0) -> float:
    """One IoU for two sets of boxes: matched one to one as well as possible, sum of the IoUs / size of the larger set.

    A missing and a superfluous box both cost. With one box on each side this is their plain IoU. Of the true boxes
    `num_optional`, any of them, may be missing.
    """
    iou = pairwise_iou(predicted_xyxy, truth_xyxy)
    rows, columns = linear_sum_assignment(iou, maximize=True)
    num_predicted, num_true = iou.shape
    return float(iou[rows, columns].sum() / max(num_predicted, num_true - num_optional))


def score_answer(
    answer_text: str,
    truth_boxes_xyxy: Sequence[Box] | None,
    image_size_px: tuple[int, int],
    not_found: Collection[str],
    truth_text: str | None = None,
    num_cut_boxes: int = 0,
) -> AnswerScore:
    """Score the answer to one turn.

    truth_boxes_xyxy: pixels; empty = the thing is absent; None = a verbatim turn without boxes: give `truth_text`.
    not_found: the not-found sentences that count (`Wording.not_found_sentences`).
    num_cut_boxes: how many of the true boxes need not be named, because the list was to be cut; no matter which.
    """
    answer = answer_text.strip()
    if truth_boxes_xyxy is None:
        if truth_text is None:
            raise ValueError("a turn without boxes is scored by its text: give truth_text")
        return AnswerScore(TEXT, exact=answer == truth_text.strip())
    kind = PRESENT if len(truth_boxes_xyxy) else ABSENT
    if answer in {sentence.strip() for sentence in not_found}:
        return AnswerScore(kind, said_not_found=True)
    bins = parse_boxes(answer)
    if bins is None:
        return AnswerScore(kind, readable=False)
    if kind == ABSENT:
        return AnswerScore(kind)
    boxes = boxes_from_bins(bins, image_size_px)
    return AnswerScore(kind, iou=match_iou(boxes, truth_boxes_xyxy, num_cut_boxes))


def summarize(scores: Sequence[AnswerScore]) -> dict[str, float]:
    """Means over many answers; a key that would divide by zero is left out.

    Over present turns: mean_iou, acc@0.5, acc@0.75 (IoU >= threshold), all with an unreadable answer as IoU 0, and
    false_not_found. Over absent turns: not_found_acc, answered with a not-found sentence. Over both: unreadable.
    Over text turns: text_exact, answered word for word.
    """
    present = [score for score in scores if score.kind == PRESENT]
    absent = [score for score in scores if score.kind == ABSENT]
    text = [score for score in scores if score.kind == TEXT]
    shares: dict[str, list[float]] = {
        "mean_iou": [score.iou for score in present],
        "acc@0.5": [score.iou >= 0.5 for score in present],
        "acc@0.75": [score.iou >= 0.75 for score in present],
        "false_not_found": [score.said_not_found for score in present],
        "not_found_acc": [score.said_not_found for score in absent],
        "unreadable": [not score.readable for score in present + absent],
        "text_exact": [score.exact for score in text],
    }
    counts = {"num_present": float(len(present)), "num_absent": float(len(absent)), "num_text": float(len(text))}
    return {key: float(np.mean(values)) for key, values in shares.items() if values} | counts
