"""The metrics against values of torchvision, pycocotools, sacrebleu, rouge_score and the authors' own evaluations."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from golden_cases import FULL, OWN

from cogvlm_ft.grounding.average_precision import COCO_AREAS_PX2, average_precision, rank_boxes
from cogvlm_ft.grounding.boxes import format_boxes
from cogvlm_ft.grounding.descriptions import corpus_bleu, corpus_chrf, rouge_l
from cogvlm_ft.grounding.metrics import AnswerScore, score_answer, summarize
from cogvlm_ft.grounding.overlap import (
    pairwise_ciou,
    pairwise_diou,
    pairwise_giou,
    pairwise_iou,
)
from cogvlm_ft.grounding.protocols import PROTOCOLS, Protocol, first_group

CASE_FILES = [path for path in (OWN / "metrics/metrics.json", FULL / "metrics.json") if path.is_file()]
SIZE = (1000, 1000)


@pytest.fixture(scope="module", params=CASE_FILES, ids=["repository", "shared"][: len(CASE_FILES)])
def golden(request: pytest.FixtureRequest) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(request.param.read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize(
    ("name", "overlap"),
    [("iou", pairwise_iou), ("giou", pairwise_giou), ("diou", pairwise_diou), ("ciou", pairwise_ciou)],
)
def test_overlap_of_pairs(golden: dict[str, Any], name: str, overlap: Any) -> None:
    pairs = golden["pairwise"]
    assert len(pairs[name]) == 13
    np.testing.assert_allclose(np.diag(overlap(pairs["a"], pairs["b"])), pairs[name], atol=2e-6)


def test_giou_of_the_right_label(golden: dict[str, Any]) -> None:
    case = golden["torchmetrics_doc_giou"]
    label = case["target_labels"][0]
    same = [box for box, of in zip(case["preds"], case["pred_labels"], strict=True) if of == label]
    assert pairwise_giou(same, case["target"])[0, 0] == pytest.approx(case["giou"], abs=5e-5)


def score_set(sample: dict[str, Any]) -> AnswerScore:
    """As one answer; the read boxes are given, so that they are not rounded to thousandths."""
    boxes = [tuple(box) for box in sample["pred"]]
    given = Protocol("given", lambda text, size: boxes, lambda truth, size: list(truth), every_box=True)
    return score_answer("?" if boxes else "none", sample["gt"], SIZE, ("none",), protocol=given)


def test_sets_of_boxes_as_grec_scores_them(golden: dict[str, Any]) -> None:
    case = golden["grec"]
    assert len(case["samples"]) == 64
    found = summarize([score_set(sample) for sample in case["samples"]])
    official, paper = case["official_code_giou"], case["paper_text_iou_same_code_with_iou"]
    assert found["grec_f1_giou_official"] == official["F1_score"]
    assert found["grec_f1_iou"] == paper["F1_score"]
    assert found["t_acc"] == pytest.approx(official["T_acc"]) == pytest.approx(paper["T_acc"])
    assert found["n_acc"] == official["N_acc"] == paper["N_acc"]
    assert found["grec_f1_optimal"] >= found["grec_f1_iou"]


def test_answers_as_the_authors_of_cogvlm_score_them(golden: dict[str, Any]) -> None:
    case, protocol = golden["cogvlm_authors_refcoco"], PROTOCOLS["cogvlm_authors"]
    scores = []
    for row in case["rows"]:
        label = first_group(row["label"])
        assert label == tuple(row["label_box"][0])
        assert (first_group(row["pred"]) or (0, 0, 0, 0)) == tuple(row["pred_box"][0])
        # Boxes in pixels of an image of 1000 x 1000, in the middle of a thousandth, are written as the label is.
        truth = [
            [k + 0.5 for k in map(int, item.split(","))] for item in re.sub(r"[\[\]]", "", row["label"]).split(";")
        ]
        assert first_group(format_boxes(truth, SIZE)) == label
        scores.append(score_answer(row["pred"], truth, SIZE, (), protocol=protocol))
        assert scores[-1].iou == pytest.approx(row["iou"][0], abs=1e-6)
        assert summarize(scores[-1:], protocol)["acc@0.5"] == row["correct_strict_gt_0.5"][0]
    found = summarize(scores, protocol)
    assert found["acc@0.5"] == pytest.approx(case["accuracy_iou0.5"])
    assert found["mean_iou"] == pytest.approx(case["miou"], abs=1e-6)


def test_average_precision_as_coco_computes_it(golden: dict[str, Any]) -> None:
    case, samples = golden["coco_ap_constant_score"], golden["grec"]["samples"]
    assert case["areaRng"][1:] == [list(bounds) for bounds in COCO_AREAS_PX2.values()]
    found = average_precision([rank_boxes(each["pred"], None, each["gt"]) for each in samples])
    wanted = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ar1": "AR1", "ar10": "AR10", "ar100": "AR100"}
    assert found == {name: pytest.approx(case[theirs], abs=1e-9) for name, theirs in wanted.items()}
    for size, letter in (("small", "s"), ("medium", "m"), ("large", "l")):
        ranked = [rank_boxes(each["pred"], None, each["gt"], COCO_AREAS_PX2[size]) for each in samples]
        of_size = average_precision(ranked)
        if case[f"AP{letter}"] == -1:  # there are none
            assert of_size == {}
        else:
            assert of_size["ap"] == pytest.approx(case[f"AP{letter}"], abs=1e-9)
            assert of_size["ar100"] == pytest.approx(case[f"AR{letter}"], abs=1e-9)


def test_texts(golden: dict[str, Any]) -> None:
    zh, en = golden["text"]["zh"], golden["text"]["en"]
    assert corpus_bleu(zh["hyp"], zh["ref"], ["zh"] * 3) == pytest.approx(zh["bleu_zh"])
    assert corpus_bleu(zh["hyp"], zh["ref"], ["zh"] * 3) == pytest.approx(zh["bleu_char"])  # no Latin words in them
    assert corpus_bleu(zh["hyp"], zh["ref"], ["en"] * 3) == zh["bleu_13a"] == 0  # so the language matters
    assert corpus_bleu(en["hyp"], en["ref"], ["en"] * 3) == pytest.approx(en["bleu_13a"])
    for case in (zh, en):
        assert corpus_chrf(case["hyp"], case["ref"]) == pytest.approx(case["chrf2"])
    found = [rouge_l(a, b) for a, b in zip(en["hyp"], en["ref"], strict=True)]
    assert found == pytest.approx(en["rouge_score_default_rougeL_f"], abs=1e-6)


def test_rouge_sees_chinese_where_the_usual_package_sees_nothing(golden: dict[str, Any]) -> None:
    """rouge_score drops what is not ASCII, so nothing remains of these texts."""
    case = golden["text"]["zh"]
    pairs = list(zip(case["hyp"], case["ref"], strict=True))
    ascii_only = [tuple(re.sub(r"[^\x00-\x7f]", "", text) for text in pair) for pair in pairs]
    assert [rouge_l(*pair) for pair in ascii_only] == case["rouge_score_default_rougeL_f"] == [0, 0, 0]
    assert [rouge_l(*pair) for pair in pairs] == pytest.approx([2 * 12 / 31, 2 * 6 / 15, 1.0])
