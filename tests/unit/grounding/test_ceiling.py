"""The highest scores that box text allows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvlm_ft.grounding.boxes import format_boxes
from cogvlm_ft.grounding.ceiling import best_answer_iou, best_iou
from cogvlm_ft.grounding.metrics import score_answer
from cogvlm_ft.grounding.protocols import PROTOCOLS

SIZE = (1000, 500)


@given(st.integers(0, 900), st.integers(0, 400), st.floats(0.3, 99), st.floats(0.3, 99))
def test_of_one_box_it_is_the_iou_of_the_true_text(x: int, y: int, width: float, height: float) -> None:
    box = (x + 0.37, y + 0.11, x + 0.37 + width, y + 0.11 + height)
    scored = score_answer(format_boxes([box], SIZE), [box], SIZE, ()).iou
    assert best_answer_iou([box], SIZE) == pytest.approx(scored) == pytest.approx(best_iou(box, SIZE))


def test_of_several_boxes_it_is_their_mean() -> None:
    boxes = [(10.0, 10.0, 13.0, 12.0), (200.0, 100.0, 400.0, 300.0)]
    wanted = sum(best_iou(box, SIZE) for box in boxes) / 2
    assert best_answer_iou(boxes, SIZE) == pytest.approx(wanted)
    assert best_iou(boxes[0], SIZE) < best_iou(boxes[1], SIZE) < 1


def test_it_depends_on_how_a_protocol_reads() -> None:
    box = (100.2, 50.2, 103.2, 51.7)  # three thousandths wide and high
    ours, official = (best_answer_iou([box], SIZE, PROTOCOLS[name]) for name in ("ours", "grec_official"))
    assert official < ours < 1
    assert best_answer_iou([box], SIZE, PROTOCOLS["cogvlm_authors"]) == 1  # its labels are thousandths too
