"""Average precision by hand, and against a plain rewrite of the published loops."""

from __future__ import annotations

import numpy as np
import pytest

from cogvlm_ft.grounding.average_precision import (
    COCO_AREAS_PX2,
    IOU_THRESHOLDS,
    average_precision,
    precision_recall_curve,
    rank_boxes,
)
from cogvlm_ft.grounding.overlap import pairwise_iou

A, B, C = [0, 0, 100, 100], [500, 500, 600, 600], [800, 0, 900, 100]


def test_all_right_and_all_wrong() -> None:
    assert average_precision([rank_boxes([A, B], None, [B, A])])["ap"] == 1
    assert average_precision([rank_boxes([C], None, [B, A])])["ap"] == 0
    assert average_precision([rank_boxes([], None, [A])]) == dict.fromkeys(
        ("ap", "ap50", "ap75", "ar1", "ar10", "ar100"), 0.0
    )
    assert average_precision([rank_boxes([A], None, [])]) == average_precision([]) == {}


def test_confidence_decides_which_mistakes_cost() -> None:
    """One right box and two wrong ones: precision 1, 1/2 or 1/3 at the recall of the right one."""
    for confidence, wanted in (([0.9, 0.2, 0.1], 1), ([0.5, 0.9, 0.1], 1 / 2), ([0.1, 0.5, 0.9], 1 / 3)):
        assert average_precision([rank_boxes([A, B, C], confidence, [A])])["ap"] == pytest.approx(wanted)
    in_two = [rank_boxes([A], [0.3], [A]), rank_boxes([B], [0.6], [])]  # a box for an absent target
    assert average_precision(in_two)["ap50"] == pytest.approx(1 / 2)


def test_equal_confidences_keep_their_order() -> None:
    assert average_precision([rank_boxes([A, B], None, [A])])["ap"] == 1
    assert average_precision([rank_boxes([B, A], None, [A])])["ap"] == pytest.approx(1 / 2)


def test_recall_with_few_boxes() -> None:
    found = average_precision([rank_boxes([C, A, B], [0.9, 0.8, 0.7], [A, B])])
    assert (found["ar1"], found["ar10"], found["ar100"]) == (0, 1, 1)


def test_a_true_box_is_found_once() -> None:
    assert average_precision([rank_boxes([A, A], [0.9, 0.8], [A, B])])["ar100"] == 0.5


def test_boxes_of_another_size_are_neither_right_nor_wrong() -> None:
    tiny = [0, 200, 10, 210]
    small = rank_boxes([A, tiny], [0.9, 0.5], [A, tiny], COCO_AREAS_PX2["small"])
    assert small.num_true == 1 and small.ignored[:, 0].all() and not small.ignored[:, 1].any()
    assert average_precision([small])["ap"] == 1
    large = rank_boxes([tiny, A], [0.9, 0.5], [A], COCO_AREAS_PX2["large"])  # a wrong tiny box is not counted
    assert average_precision([large])["ap"] == 1


def test_the_curve_ends_where_recall_does() -> None:
    curve = precision_recall_curve([rank_boxes([A, C], [0.9, 0.8], [A, B])])
    assert len(curve) == 101
    assert [precision for recall, precision in curve if recall <= 0.5] == [1.0] * 51
    assert [precision for recall, precision in curve if recall > 0.5] == [0.0] * 50
    assert precision_recall_curve([]) == []


def plain_match(boxes: np.ndarray, truth: np.ndarray, optional: np.ndarray, threshold: float) -> list[int]:
    """The published loop: true boxes that may be missed come last, and are taken only if no other fits."""
    iou, taken, found = pairwise_iou(boxes, truth), set(), []
    for d in range(len(boxes)):
        best, match = min(threshold, 1 - 1e-10), -1
        for g in range(len(truth)):
            if g in taken:
                continue
            if match > -1 and not optional[match] and optional[g]:
                break
            if iou[d, g] < best:
                continue
            best, match = iou[d, g], g
        taken.add(match)
        found.append(match)
    return found


def test_matching_is_that_of_the_published_loop() -> None:
    rng = np.random.default_rng(11)
    num_hits = 0
    for _ in range(60):
        corner = rng.integers(0, 40, (rng.integers(0, 7), 2))
        truth = np.concatenate([corner, corner + rng.integers(5, 60, corner.shape)], axis=1)
        boxes = np.concatenate([truth, truth])[rng.permutation(2 * len(truth))] + rng.integers(
            -4, 5, (2 * len(truth), 4)
        )
        confidence = rng.integers(0, 4, len(boxes)) / 4
        areas = np.prod(truth[:, 2:] - truth[:, :2], axis=1)
        optional = (areas < 32**2) | (areas > 96**2)
        order = np.argsort(optional, kind="stable")
        best_first = boxes[np.argsort(-confidence, kind="stable")]
        ranked = rank_boxes(boxes, confidence, truth, COCO_AREAS_PX2["medium"])
        for row, threshold in enumerate(IOU_THRESHOLDS):
            wanted = plain_match(best_first, truth[order], optional[order], threshold)
            assert ranked.hit[row].tolist() == [match > -1 for match in wanted]
            for place, match in enumerate(wanted):
                if match > -1:
                    assert ranked.ignored[row, place] == optional[order][match]
            num_hits += int(ranked.hit[row].sum())
    assert num_hits > 500
