from __future__ import annotations

import numpy as np
import pytest

from cogvlm_ft.grounding.boxes import boxes_from_bins, format_boxes
from cogvlm_ft.grounding.metrics import AnswerScore, is_lower_better, match_iou, score_answer, summarize
from cogvlm_ft.grounding.overlap import (
    centre_inside,
    count_matched,
    count_matched_greedily,
    pairwise_giou,
    pairwise_iou,
)
from cogvlm_ft.grounding.targets import Box

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
    # Greedy would give the first answer its best truth (IoU 0.9) and leave none for the second.
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
    boxes = boxes_from_bins([(100, 100, 300, 200)], SIZE)
    score = score_answer(answer, [truth], SIZE, NOT_FOUND)
    assert (score.kind, score.iou, score.giou) == (
        "present",
        pairwise_iou(boxes, [truth])[0, 0],
        pairwise_giou(boxes, [truth])[0, 0],
    )
    assert (score.num_answered, score.num_true, score.num_hits, score.centre) == (1, 1, 0, 1.0)
    assert 0.4 < score.iou < 0.5


def test_a_perfect_answer_scores_almost_one() -> None:
    truth = [(17.0, 300.0, 400.0, 555.0), (600.0, 20.0, 900.0, 80.0)]
    score = score_answer(format_boxes(truth[::-1], (913, 601)), truth, (913, 601), NOT_FOUND)
    assert score.iou > 0.97


@pytest.mark.parametrize("answer", ["", "a dog", "[[1,2,3]]", "[[100, 100, 300, 300]]", "未找到"])
def test_unreadable_answers_count_as_misses(answer: str) -> None:
    present = score_answer(answer, [(0, 0, 9, 9)], SIZE, NOT_FOUND)
    assert present == AnswerScore("present", readable=False, num_true=1)
    assert (present.iou, present.giou, present.diou, present.ciou, present.centre) == (0, -1, -1, -1, 0)
    absent = score_answer(answer, [], SIZE, NOT_FOUND)
    assert (absent.kind, absent.readable, absent.num_answered) == ("absent", False, 0)


@pytest.mark.parametrize("answer", ["[[300,300,100,100]]", "[[300,100,100,300]]", "[[100,300,300,100]]"])
def test_inverted_answers_count_as_misses_and_are_never_dropped(answer: str) -> None:
    right = score_answer("[[100,100,300,300]]", [(100, 100, 300, 300)], SIZE, NOT_FOUND)
    score = score_answer(answer, [(100, 100, 300, 300)], SIZE, NOT_FOUND)
    assert (score.readable, score.iou, score.giou, score.centre, score.num_hits) == (True, 0, -1, 0, 0)
    found = summarize([right, score])
    assert found["mean_iou"] == right.iou / 2 and found["acc@0.5"] == found["acc@0.9"] == 0.5
    assert found["num_present"] == 2 and found["unreadable"] == 0


def test_not_found_is_exact_but_for_blanks_around_it() -> None:
    assert score_answer(" 未找到指定目标\n", [], SIZE, NOT_FOUND).said_not_found
    assert score_answer(NOT_FOUND[1], [(0, 0, 9, 9)], SIZE, NOT_FOUND) == AnswerScore(
        "present", said_not_found=True, num_true=1
    )
    assert not score_answer("未找到指定目标。", [], SIZE, NOT_FOUND).said_not_found


def test_boxes_for_an_absent_thing_are_readable_but_wrong() -> None:
    score = score_answer("[[1,2,3,4;5,6,7,8]]", [], SIZE, NOT_FOUND)
    assert score == AnswerScore("absent", num_answered=2)
    assert not score.all_found and not score.all_found_greedy_iou and not score.all_found_greedy_giou


def test_verbatim_turns_need_the_exact_text() -> None:
    assert score_answer("two dogs ", None, SIZE, NOT_FOUND, truth_text="two dogs").exact
    assert not score_answer("Two dogs", None, SIZE, NOT_FOUND, truth_text="two dogs").exact
    with pytest.raises(ValueError, match="truth_text"):
        score_answer("two dogs", None, SIZE, NOT_FOUND)


def test_summary_of_all_kinds() -> None:
    scores = [
        AnswerScore(
            "present", iou=0.5, giou=0.25, diou=0.5, ciou=0.5, centre=1.0, num_answered=1, num_true=1, num_hits=1
        ),
        AnswerScore("present", iou=0.75, giou=0.75, diou=0.5, ciou=0.5, centre=1.0, num_answered=2, num_true=2),
        AnswerScore("present", readable=False, num_true=1),
        AnswerScore("present", said_not_found=True, num_true=1),
        AnswerScore("absent", said_not_found=True, all_found=True, all_found_greedy_iou=True),
        AnswerScore("absent", num_answered=1),
        AnswerScore("text", exact=True),
    ]
    assert summarize(scores) == {
        "mean_iou": pytest.approx(1.25 / 4),
        "acc@0.5": 0.5,
        "acc@0.75": 0.25,
        "acc@0.9": 0.0,
        "mean_giou": pytest.approx(-1 / 4),
        "mean_diou": pytest.approx(-1 / 4),
        "mean_ciou": pytest.approx(-1 / 4),
        "centre_acc": 0.5,
        "false_not_found": 0.25,
        "not_found_acc": 0.5,
        "t_acc": 0.5,
        "n_acc": 0.5,
        "unreadable": pytest.approx(1 / 6),
        "count_acc": pytest.approx(3 / 6),
        "grec_f1_iou": pytest.approx(1 / 6),
        "grec_f1_giou_official": 0.0,
        "grec_f1_optimal": pytest.approx(1 / 6),
        "precision@0.5": pytest.approx(1 / 4),
        "recall@0.5": pytest.approx(1 / 5),
        "f1@0.5": pytest.approx(2 / 9),
        "text_exact": 1.0,
        "num_present": 4.0,
        "num_absent": 2.0,
        "num_text": 1.0,
    }


A, B, C = (0.0, 0.0, 100.0, 100.0), (500.0, 500.0, 600.0, 600.0), (800.0, 0.0, 900.0, 100.0)


def say(*boxes: Box) -> str:
    return format_boxes(boxes, SIZE)


@pytest.mark.parametrize(
    ("answer", "truth", "num_cut", "wanted"),
    [
        pytest.param(say(B, A), [A, B], 0, (2, True, True), id="all, in another order"),
        pytest.param(say(A), [A, B], 0, (1, False, False), id="one is missing"),
        pytest.param(say(A, B, C), [A, B], 0, (2, False, False), id="one too much"),
        pytest.param(say(A, A), [A, B], 0, (1, False, True), id="one named twice"),
        pytest.param(say(A, B), [A, B, C], 1, (2, True, True), id="one was cut from the list"),
        pytest.param(say(A, B, C), [A, B, C], 1, (3, True, True), id="named although it was cut"),
        pytest.param(NOT_FOUND[0], [A], 0, (0, False, False), id="not found"),
        pytest.param("?", [A], 0, (0, False, False), id="unreadable"),
        pytest.param(NOT_FOUND[0], [], 0, (0, True, True), id="absent, and said so"),
        pytest.param("?", [], 0, (0, True, False), id="absent, unreadable: no box, but no answer either"),
        pytest.param(say(A), [], 0, (0, False, False), id="absent, but a box"),
    ],
)
def test_sets_of_boxes(answer: str, truth: list[Box], num_cut: int, wanted: tuple[int, bool, bool]) -> None:
    score = score_answer(answer, truth, SIZE, NOT_FOUND, num_cut_boxes=num_cut)
    count_is_right = summarize([score])["count_acc"] == 1
    assert (score.num_hits, score.all_found, count_is_right) == wanted
    assert score.all_found_greedy_iou == score.all_found_greedy_giou == score.all_found


def test_boxes_that_were_cut_are_missed_by_nobody() -> None:
    found = summarize([score_answer(say(A, B), [A, B, C], SIZE, NOT_FOUND, num_cut_boxes=1)])
    assert found["precision@0.5"] == found["recall@0.5"] == found["f1@0.5"] == 1
    found = summarize([score_answer(say(A), [A, B, C], SIZE, NOT_FOUND, num_cut_boxes=1)])
    assert (found["precision@0.5"], found["recall@0.5"]) == (1, 0.5)


def test_the_best_matching_may_find_what_the_greedy_one_misses() -> None:
    overlap = np.array([[0.9, 0.6], [0.8, 0.1]])
    assert (count_matched(overlap, 0.5), count_matched_greedily(overlap, 0.5)) == (2, 1)
    for empty in (np.zeros((0, 2)), np.zeros((2, 0))):
        assert count_matched(empty, 0.5) == count_matched_greedily(empty, 0.5) == 0


@pytest.mark.parametrize(("strict", "num_matched"), [(False, 1), (True, 0)])
def test_a_hit_at_exactly_the_threshold(strict: bool, num_matched: int) -> None:
    assert count_matched(np.array([[0.5]]), 0.5, strict=strict) == num_matched


def test_the_best_matching_never_finds_less_than_the_greedy_one() -> None:
    rng = np.random.default_rng(3)
    found = [rng.random(rng.integers(0, 5, 2)) for _ in range(300)]
    pairs = [(count_matched(overlap, 0.5), count_matched_greedily(overlap, 0.5)) for overlap in found]
    assert all(best >= greedy for best, greedy in pairs)
    assert any(best > greedy for best, greedy in pairs)


def test_centres_edges_included() -> None:
    boxes = [[0, 0, 20, 20], [10, 10, 30, 30], [10.1, 0, 30.1, 20], [20, 20, 0, 0]]
    assert centre_inside(boxes, [[0, 0, 20, 20]])[:, 0].tolist() == [True, True, False, False]


def test_directions() -> None:
    assert is_lower_better("unreadable") and is_lower_better("false_not_found/language=zh")
    assert not is_lower_better("mean_iou") and not is_lower_better("not_found_acc/size=small")


def test_summary_leaves_out_what_it_cannot_divide() -> None:
    counts = {"num_present": 0.0, "num_absent": 0.0, "num_text": 0.0}
    assert summarize([]) == counts
    assert summarize([AnswerScore("text")]) == counts | {"num_text": 1.0, "text_exact": 0.0}
