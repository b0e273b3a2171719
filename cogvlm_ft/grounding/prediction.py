"""One answered question, with everything that is scored and everything that scores are split by."""

from __future__ import annotations

from dataclasses import dataclass

from cogvlm_ft.grounding.metrics import AnswerScore
from cogvlm_ft.grounding.targets import Box


@dataclass(frozen=True)
class Prediction:
    """One answered turn. Boxes in pixels of the stored photo; boxes_xyxy None = unreadable or not found;
    truth_boxes_xyxy empty = absent, None = a turn without boxes; score None = free text, which is not scored, or a turn
    that the protocol leaves out.

    history: the true (prompt, answer) pairs before it. num_cut_boxes: true boxes that need not be named.
    confidences, expected_boxes_xyxy: of each answered box (grounding.boxes.ReadBox); None = not known.
    not_found_prob: how likely the model found the not-found sentence; None = not known.
    described: the true answer has words of its own about the thing, so its text is compared too.
    language, source, style: "zh" or "en"; where the photo came from; how the question is put, "own" for the user's.
    frame_px: (width, height) of what the model saw, in pixels of the photo, grey beside it included.
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
    not_found_prob: float | None = None
    described: bool = False
    language: str = ""
    source: str = ""
    style: str = ""
    frame_px: tuple[int, int] = (0, 0)
