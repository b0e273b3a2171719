"""One answered question, with all values that scores and groups are computed from."""

from __future__ import annotations

from dataclasses import dataclass

from cogvlm_ft.grounding.metrics import ABSENT, HIT, PRESENT, AnswerScore
from cogvlm_ft.grounding.targets import Box


@dataclass(frozen=True)
class Prediction:
    """One answered turn.

    Boxes are in pixels of the stored image. boxes_xyxy: None = unreadable or not found. truth_boxes_xyxy: empty =
    absent, None = a turn without boxes. score: None = free text, which is not scored, or a turn that the
    protocol leaves out.

    history: the true (prompt, answer) pairs before it. num_cut_boxes: true boxes that need not be named.
    confidences, expected_boxes_xyxy: of each answered box (grounding.boxes.ReadBox); None = not known.
    removed_boxes_xyxy, removed_confidences: boxes from tiles that do not count, but are ranked; None = there are none.
    not_found_prob: the model's probability of the not-found sentence; None = not known.
    described: the true answer includes a description of the target, so its text is compared too.
    language, source, style: "zh" or "en"; the source of the image; the style of the question, "own" for the user's.
    phrase: of the target that is asked for; "" for turns without a target.
    truncated: the answer reached the token limit without its end; boxes of a cut list are those that it closed.
    frame_px: (width, height) of the model's input, in pixels of the stored image, padding included.
    """

    key: str
    turn: int
    prompt: str
    answer: str
    truth: str
    boxes_xyxy: list[Box] | None
    truth_boxes_xyxy: list[Box] | None
    image_size_px: tuple[int, int]
    score: AnswerScore | None
    history: tuple[tuple[str, str], ...] = ()
    num_cut_boxes: int = 0
    confidences: list[float] | None = None
    expected_boxes_xyxy: list[Box] | None = None
    removed_boxes_xyxy: list[Box] | None = None
    removed_confidences: list[float] | None = None
    not_found_prob: float | None = None
    described: bool = False
    language: str = ""
    source: str = ""
    style: str = ""
    frame_px: tuple[int, int] = (0, 0)
    phrase: str = ""
    truncated: bool = False


def ranked_boxes(prediction: Prediction) -> tuple[list[Box], list[float]]:
    """Return all answered boxes with their confidences, 1 where unknown, also those from tiles that do not count.

    A ranking needs them: which boxes count is decided by a threshold, and average precision is the mean over all.
    """
    boxes, confidences = prediction.boxes_xyxy or [], prediction.confidences or []
    known = confidences if len(confidences) == len(boxes) else [1.0] * len(boxes)
    return [*boxes, *(prediction.removed_boxes_xyxy or [])], [*known, *(prediction.removed_confidences or [])]


def score_of(prediction: Prediction) -> float | None:
    """Return the IoU, or 1 or 0 for whether an absent target was reported as not found; None if neither applies."""
    score = prediction.score
    if score is None or score.kind not in (PRESENT, ABSENT):
        return None
    return score.iou if score.kind == PRESENT else float(score.said_not_found)


def is_right(prediction: Prediction) -> bool | None:
    """Return whether an answer counts as right: IoU 0.5 or more, or a correct "not found". None: not scored."""
    score = score_of(prediction)
    return None if score is None else score >= HIT
