from __future__ import annotations

import pytest

from cogvlm_ft.grounding.descriptions import corpus_bleu, corpus_chrf, description_metrics, rouge_l, text_without_boxes


def test_equal_texts_score_the_most() -> None:
    texts = ["一只棕色的小狗趴在地上", "a brown dog lies on the ground"]
    found = description_metrics(texts, texts, ["zh", "en"])
    assert found == {
        "chrf": pytest.approx(100),
        "bleu": pytest.approx(100),
        "rouge_l": 1.0,
        "empty_answers": 0.0,
        "num_descriptions": 2.0,
    }
    assert description_metrics([], [], []) == {}


@pytest.mark.parametrize("answer", ["", "  \n"])
@pytest.mark.parametrize(("truth", "language"), [("一只棕色的小狗趴在地上", "zh"), ("a brown dog lies here", "en")])
def test_an_empty_answer_scores_0_and_is_not_left_out(answer: str, truth: str, language: str) -> None:
    alone = description_metrics([answer], [truth], [language])
    assert (alone["chrf"], alone["bleu"], alone["rouge_l"], alone["empty_answers"]) == (0, 0, 0, 1)
    both = description_metrics([truth, answer], [truth, truth], [language] * 2)
    assert both["rouge_l"] == both["empty_answers"] == 0.5
    assert 0 < both["chrf"] < 90 and 0 < both["bleu"] < 90


def test_two_languages_are_cut_each_in_its_own_way() -> None:
    zh, en = ("图中有一只黑色的狗在睡", "图里有一只黑色的狗在睡"), ("a dog, black.", "a dog, black, sleeps.")
    assert corpus_bleu([zh[0]], [zh[1]], ["zh"]) > 50 > corpus_bleu([zh[0]], [zh[1]], ["en"])
    mixed = corpus_bleu([zh[0], en[0]], [zh[1], en[1]], ["zh", "en"])
    parts = [corpus_bleu([zh[0]], [zh[1]], ["zh"]), corpus_bleu([en[0]], [en[1]], ["en"])]
    assert min(parts) < mixed < max(parts)


def test_better_texts_score_higher() -> None:
    truth = "左边的红色小汽车"
    for score in (lambda text: corpus_chrf([text], [truth]), lambda text: rouge_l(text, truth)):
        assert score(truth) > score("左侧的红色汽车") > score("一棵树上的汽球") > score("飞机")


@pytest.mark.parametrize(
    ("answer", "truth", "wanted"),
    [
        ("红车", "红色车", 2 * 2 / 5),
        ("a Red car", "the red CAR", 2 * 2 / 6),
        ("red car 红车", "红车 red car", 2 * 2 / 8),
        ("123, 4", "123 5", 2 * 1 / 4),
        ("été", "ete", 0),
        ("!?", "!?", 0),
        ("", "red", 0),
    ],
)
def test_longest_common_subsequence(answer: str, truth: str, wanted: float) -> None:
    assert rouge_l(answer, truth) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("一只狗,所在区域为[[086,540,400,760]]", "一只狗,所在区域为"),
        ("a [[1,2,3,4]] and b [[5,6,7,8;1,2,3,4]].", "a  and b ."),
        ("no box", "no box"),
        ("left [[ open", "left [[ open"),
        ("[[1,2,3,4]]", ""),
    ],
)
def test_boxes_are_no_words(text: str, wanted: str) -> None:
    assert text_without_boxes(text) == wanted
