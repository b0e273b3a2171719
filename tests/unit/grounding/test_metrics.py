from __future__ import annotations

import numpy as np
import pytest

from cogvlm_ft.grounding.boxes import boxes_from_bins, format_boxes
from cogvlm_ft.grounding.metrics import AnswerScore, match_iou, pairwise_iou, score_answer, summarize

NOT_FOUND = ("未找到指定目标", "The specified target was not found.")
SIZE = (1000, 1000)


def test_pairwise_iou_of_known_pairs() -> None:
    iou = pairwise_iou([[0, 0, 100, 100], [0, 0, 10, 10]], [[0, 0, 50, 50], [0, 0, 10, 5], [20, 20, 30, 30]])
    np.testing.assert_allclose(iou, [[0.25, 0.005, 0.01], [0.04, 0.5, 0.0]])


def test_inverted_and_empty_boxes_have_no_overlap() -> None:
    bad = [[50, 50, 10, 10], [50, 0, 10, 40], [5, 5, 5, 20], [0, 0, 0, 0]]
    assert not pairwise_iou(bad, [[0, 0, 60, 60], *bad]).any()


def test_pairwise_iou_is_exactly_one_for_equal_boxes_and_empty_for_none() -> None:
    assert pairwise_iou([[0.1, 0.2, 7.7, 9.3]], [[0.1, 0.2, 7.7, 9.3]])[0, 0] == 1.0
    assert pairwise_iou([], [[0, 0, 1, 1]]).shape == (0, 1)


def test_matching_is_the_best_one_not_the_first_one() -> None:
    # Greedy would give the first answer its best truth (IoU 0.9) and leave the second with nothing.
    truth = [[0, 0, 100, 100], [0, 0, 100, 80]]
    predicted = [[0, 0, 100, 90], [0, 0, 100, 110]]
    assert match_iou(predicted, truth) == pytest.approx((80 / 90 + 100 / 110) / 2)


def test_missing_and_superfluous_boxes_cost_the_same() -> None:
    one, other = [0, 0, 10, 10], [50, 50, 60, 60]
    assert match_iou([one], [one, other]) == match_iou([one, other], [one]) == 0.5
    assert match_iou([other, one], [one, other]) == 1.0


def test_one_truth_and_one_answer_give_plain_iou() -> None:
    truth = (100.0, 100.0, 300.0, 300.0)
    answer = "图片中存在一只狗,所在区域为[[100,100,300,200]]"
    expected = pairwise_iou(boxes_from_bins([(100, 100, 300, 200)], SIZE), [truth])[0, 0]
    assert score_answer(answer, [truth], SIZE, NOT_FOUND) == AnswerScore("present", iou=expected)
    assert 0.4 < expected < 0.6


def test_a_perfect_answer_scores_almost_one() -> None:
    truth = [(17.0, 300.0, 400.0, 555.0), (600.0, 20.0, 900.0, 80.0)]
    score = score_answer(format_boxes(truth[::-1], (913, 601)), truth, (913, 601), NOT_FOUND)
    assert score.iou > 0.97


@pytest.mark.parametrize("answer", ["", "a dog", "[[1,2,3]]", "[[100, 100, 300, 300]]", "未找到"])
def test_unreadable_answers_count_as_misses(answer: str) -> None:
    assert score_answer(answer, [(0, 0, 9, 9)], SIZE, NOT_FOUND) == AnswerScore("present", readable=False)
    assert score_answer(answer, [], SIZE, NOT_FOUND) == AnswerScore("absent", readable=False)


def test_not_found_is_exact_but_for_blanks_around_it() -> None:
    assert score_answer(" 未找到指定目标\n", [], SIZE, NOT_FOUND).said_not_found
    assert score_answer(NOT_FOUND[1], [(0, 0, 9, 9)], SIZE, NOT_FOUND) == AnswerScore("present", said_not_found=True)
    assert not score_answer("未找到指定目标。", [], SIZE, NOT_FOUND).said_not_found


def test_boxes_for_an_absent_thing_are_readable_but_wrong() -> None:
    assert score_answer("[[1,2,3,4]]", [], SIZE, NOT_FOUND) == AnswerScore("absent")


def test_verbatim_turns_need_the_exact_text() -> None:
    assert score_answer("two dogs ", None, SIZE, NOT_FOUND, truth_text="two dogs").exact
    assert not score_answer("Two dogs", None, SIZE, NOT_FOUND, truth_text="two dogs").exact
    with pytest.raises(ValueError, match="truth_text"):
        score_answer("two dogs", None, SIZE, NOT_FOUND)


def test_summary_of_all_kinds() -> None:
    scores = [
        AnswerScore("present", iou=0.5),
        AnswerScore("present", iou=0.75),
        AnswerScore("present", readable=False),
        AnswerScore("present", said_not_found=True),
        AnswerScore("absent", said_not_found=True),
        AnswerScore("absent"),
        AnswerScore("text", exact=True),
    ]
    assert summarize(scores) == {
        "mean_iou": pytest.approx(1.25 / 4),
        "acc@0.5": 0.5,
        "acc@0.75": 0.25,
        "false_not_found": 0.25,
        "not_found_acc": 0.5,
        "unreadable": pytest.approx(1 / 6),
        "text_exact": 1.0,
        "num_present": 4.0,
        "num_absent": 2.0,
        "num_text": 1.0,
    }


def test_summary_leaves_out_what_it_cannot_divide() -> None:
    counts = {"num_present": 0.0, "num_absent": 0.0, "num_text": 0.0}
    assert summarize([]) == counts
    assert summarize([AnswerScore("text")]) == counts | {"num_text": 1.0, "text_exact": 0.0}
