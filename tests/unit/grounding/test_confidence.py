"""The least confidence of boxes: where F1 is highest."""

from __future__ import annotations

import pytest

from cogvlm_ft.grounding.average_precision import RankedBoxes, rank_boxes
from cogvlm_ft.grounding.confidence import KeptBoxes, choose_boxes, confidence_curve
from cogvlm_ft.grounding.targets import Box

HERE, THERE = (0.0, 0.0, 10.0, 10.0), (50.0, 50.0, 60.0, 60.0)


def ranked(boxes: list[Box], confidences: list[float], truth: list[Box]) -> RankedBoxes:
    return rank_boxes(boxes, confidences, truth)


def test_the_threshold_is_halfway_below_the_boxes_that_give_the_highest_f1() -> None:
    questions = [
        ranked([HERE, THERE], [0.9, 0.3], [HERE]),
        ranked([THERE, HERE], [0.7, 0.4], [HERE, THERE]),
        ranked([HERE], [0.2], []),  # absent
    ]
    curve = confidence_curve(questions)
    assert curve is not None and curve.f1 == 1 and curve.kept == KeptBoxes(pytest.approx(0.35))
    assert curve.points[0] == pytest.approx([0.9, 1, 1 / 3, 0.5]), "the most confident box alone"
    assert curve.points[-1] == pytest.approx([0.2, 3 / 5, 1, 0.75])


def test_boxes_of_equal_confidence_are_kept_or_removed_together_and_all_are_kept_if_that_is_best() -> None:
    curve = confidence_curve([ranked([HERE], [0.5], [HERE]), ranked([THERE], [0.5], [])])
    assert curve is not None and (curve.kept, len(curve.points)) == (KeptBoxes(), 1)
    assert confidence_curve([ranked([], [], [HERE])]) is None and confidence_curve([ranked([HERE], [0.5], [])]) is None
    assert confidence_curve([]) is None


def test_only_the_best_box_counts_if_no_question_has_more_than_one_true_box() -> None:
    """Then a true box below wrong ones of other questions can be kept."""
    questions = [
        ranked([HERE, THERE], [0.9, 0.6], [HERE]),
        ranked([HERE, THERE], [0.5, 0.45], [HERE]),
        ranked([THERE], [0.3], []),
    ]
    every, best = confidence_curve(questions), choose_boxes(questions)
    assert every is not None and every.f1 == pytest.approx(0.8) and best is not None and best.f1 == 1
    assert best.kept == KeptBoxes(pytest.approx(0.4), only_best=True)
    several = choose_boxes([*questions, ranked([HERE], [0.9], [HERE, THERE])])
    assert several is not None and not several.kept.only_best
