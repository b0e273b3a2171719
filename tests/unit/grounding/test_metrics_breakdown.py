"""Metrics of an evaluation: by group, the threshold for "not found", and texts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cogvlm_ft.grounding.boxes import format_boxes
from cogvlm_ft.grounding.breakdown import MAX_SOURCES, size_classes, summarize_predictions
from cogvlm_ft.grounding.metrics import AVERAGED, LOWER_IS_BETTER, score_answer
from cogvlm_ft.grounding.not_found import not_found_curve
from cogvlm_ft.grounding.prediction import Prediction
from cogvlm_ft.grounding.protocols import OURS, PROTOCOLS
from cogvlm_ft.grounding.targets import Box

REPOSITORY = Path(__file__).resolve().parents[3]
SIZE, NOT_FOUND, NUM_PATCHES = (1000, 1000), ("none",), 100
BIG, SMALL = (100.0, 100.0, 300.0, 300.0), (500.0, 500.0, 520.0, 520.0)


def answered(boxes: list[Box] | None, answer: str, protocol: str = "ours", **fields: object) -> Prediction:
    prediction = Prediction(
        key="a",
        turn=0,
        prompt="?",
        answer=answer,
        truth="a dog",
        boxes_xyxy=PROTOCOLS[protocol].read(answer, SIZE),
        truth_boxes_xyxy=boxes,
        image_size_px=SIZE,
        score=score_answer(answer, boxes, SIZE, NOT_FOUND, "a dog", protocol=PROTOCOLS[protocol]),
        language="en",
        source="a.json:1",
        style="refer",
        frame_px=SIZE,
    )
    return replace(prediction, **fields)  # type: ignore[arg-type]


def metrics_of(predictions: list[Prediction]) -> dict[str, float]:
    return summarize_predictions(predictions, NUM_PATCHES).metrics


def test_every_metric_is_split_by_every_group() -> None:
    found = metrics_of(
        [
            answered([BIG], format_boxes([BIG], SIZE)),
            answered([SMALL], "?", language="zh", style="detect", source="b.json:7"),
            answered([BIG, SMALL], format_boxes([BIG], SIZE)),
            answered([], "none", language="zh"),
        ]
    )
    assert {key.partition("/")[2].partition("=")[0] for key in found if "/" in key} == {
        *("language", "source", "targets", "template", "size", "share", "patches")
    }
    assert found["unreadable"] == 1 / 4
    assert found["unreadable/language=zh"] == found["unreadable/template=detect"] / 2 == 1 / 2
    assert found["not_found_acc/targets=0"] == 1 and "mean_iou/targets=0" not in found
    assert found["recall@0.5/targets=2+"] == found["count_acc/targets=1"] == 1 / 2
    assert found["num_present/source=a.json"] == 2 and found["unreadable/source=b.json"] == 1
    assert found["acc@0.5/size=small"] == 0 and found["acc@0.5/targets=1"] == 0.5
    assert all(isinstance(value, float) for value in found.values())


def test_the_parts_add_up() -> None:
    rng = np.random.default_rng(0)
    predictions = []
    for _ in range(60):
        x, y, side = rng.integers(0, 500, 3) + 1
        truth = [(float(x), float(y), float(x + side), float(y + side))] * int(rng.integers(0, 3))
        answer = "none" if rng.random() < 0.3 else f"[[{x:03d},{y:03d},{x + side:03d},{y + side // 2:03d}]]"
        language = str(rng.choice(["zh", "en"]))
        predictions.append(answered(truth, answer, language=language, style=str(rng.choice(["refer", "steps"]))))
    found = metrics_of(predictions)
    for group in ("language", "template", "targets", "source", "size", "share", "patches"):
        values = {key.partition("/")[2] for key in found if f"/{group}=" in key}
        num = {value: found[f"num_present/{value}"] for value in values}
        assert sum(num.values()) == found["num_present"]
        mean = sum(found.get(f"mean_iou/{value}", 0) * num[value] for value in values) / found["num_present"]
        assert mean == pytest.approx(found["mean_iou"])


@pytest.mark.parametrize(
    ("box", "wanted"),
    [
        ((0, 0, 31, 31), "small under_1 under_1"),  # of 9800 x 4900: 0.45 % of the side, 0.006 of 12.25 patches
        ((0, 0, 32, 32), "medium under_1 under_1"),
        ((0, 0, 95, 95), "medium 1_to_3 under_1"),
        ((0, 0, 96, 96), "large 1_to_3 under_1"),
        ((0, 0, 690, 690), "large 3_to_10 under_1"),
        ((0, 0, 2100, 2100), "large over_10 1_to_4"),
        ((0, 0, 4900, 4900), "large over_10 over_4"),
    ],
)
def test_sizes(box: Box, wanted: str) -> None:
    found = size_classes([box], (9800, 4900), (9800, 4900), num_patches=12)
    assert [name for name, _ in found] == ["size", "share", "patches"]
    assert " ".join(value for _, value in found) == wanted


def test_patches_are_those_of_the_frame_and_need_one() -> None:
    """A letterbox of a wide image: half of the patches are padding."""
    box = [(0.0, 0.0, 100.0, 100.0)]
    assert dict(size_classes(box, (1000, 500), (1000, 500), 100))["patches"] == "1_to_4"
    assert dict(size_classes(box, (1000, 500), (1000, 1010), 100))["patches"] == "under_1"
    assert "patches" not in dict(size_classes(box, (1000, 500), (0, 0), 100))


def test_of_several_boxes_the_median_counts() -> None:
    boxes = [(0.0, 0.0, side, side) for side in (10.0, 20.0, 400.0)]
    assert dict(size_classes(boxes, SIZE, SIZE, 100))["size"] == "small"


def test_precision_by_size_is_about_boxes_not_about_questions() -> None:
    """COCO's rule: of a question about a large and a small target, each counts in its own class."""
    found = metrics_of([answered([BIG, SMALL], format_boxes([BIG], SIZE))])
    assert (found["ap50/size=large"], found["ap50/size=small"]) == (1, 0)
    assert "ap50/size=medium" not in found and found["ap50/targets=2+"] == pytest.approx(found["ap50"])


def test_confidences_are_used_where_they_are_known() -> None:
    wrong = (700.0, 700.0, 900.0, 900.0)
    boxes = format_boxes([wrong, BIG], SIZE)
    assert metrics_of([answered([BIG], boxes)])["ap50"] == pytest.approx(1 / 2)
    assert metrics_of([answered([BIG], boxes, confidences=[0.2, 0.9])])["ap50"] == 1


def test_a_list_that_was_cut_is_left_out_of_average_precision() -> None:
    whole, cut = answered([BIG], "?"), answered([BIG, SMALL], format_boxes([BIG], SIZE), num_cut_boxes=1)
    assert metrics_of([whole, cut])["ap"] == 0
    assert "ap" not in metrics_of([cut])


def test_expected_coordinates_beside_the_written_ones() -> None:
    written = answered([BIG], "[[100,100,300,250]]", expected_boxes_xyxy=[BIG])
    found = metrics_of([written, answered([BIG], "?"), answered([], "none")])
    assert found["mean_iou_expected"] == found["acc@0.5_expected"] == 0.5
    assert found["mean_iou"] < 0.4
    assert "mean_iou_expected" not in metrics_of([answered([BIG], "[[100,100,300,250]]")])


def test_descriptions_are_compared_without_their_boxes() -> None:
    truth = "a brown dog at [[100,100,300,300]]"
    same = answered([BIG], "a brown dog at [[000,000,009,009]]", truth=truth, described=True)
    found = metrics_of([same, answered([BIG], "[[100,100,300,300]]", truth="[[100,100,300,300]]")])
    assert (found["chrf"], found["rouge_l"], found["num_descriptions"]) == (pytest.approx(100), 1, 1)
    free = answered(None, "", truth="a brown dog", described=True, score=None)
    assert metrics_of([same, free])["empty_answers/targets=1"] == 0
    assert metrics_of([same, free])["empty_answers"] == 0.5


def test_many_sources_are_folded() -> None:
    files = [answered([], "none", source=f"voc/{i}.xml") for i in range(MAX_SOURCES + 5)]
    found = metrics_of([*files, answered([], "none", source="more/labels a.json[3]")])
    assert {key for key in found if key.startswith("num_absent/source")} == {
        "num_absent/source=voc_*.xml",
        "num_absent/source=more_*.json",
    }
    folders = [answered([], "none", source=f"{i}/a.xml") for i in range(MAX_SOURCES + 5)]
    found = metrics_of([*folders, *folders[:MAX_SOURCES]])
    assert found["num_absent/source=others"] == 5
    assert len([key for key in found if key.startswith("num_absent/source")]) == MAX_SOURCES + 1


def test_protocols_that_read_one_box_have_no_set_metrics() -> None:
    predictions = [answered([BIG], "[[100,100,300,300]]", "qwen_vl"), answered([], "none", "qwen_vl")]
    found = summarize_predictions(predictions, NUM_PATCHES, PROTOCOLS["qwen_vl"])
    ours = summarize_predictions(predictions, NUM_PATCHES, OURS)
    missing = {key for key in ours.metrics if "/" not in key} - set(found.metrics)
    assert missing == {
        *("ap", "ap50", "ap75", "ar1", "ar10", "ar100", "count_acc"),
        *("precision@0.5", "recall@0.5", "f1@0.5", "grec_f1_iou", "grec_f1_giou_official", "grec_f1_optimal"),
    }
    assert found.curves["precision_recall"] == []


@pytest.mark.parametrize("document", ["metrics.md", "metrics_zh.md"])
def test_every_name_is_explained_in_both_languages(document: str) -> None:
    boxes = format_boxes([BIG], SIZE)
    everything = [
        answered([BIG], boxes, expected_boxes_xyxy=[BIG], confidences=[0.5], not_found_prob=0.1, described=True),
        answered([SMALL, BIG], boxes, not_found_prob=0.1),
        answered([], "none", not_found_prob=0.9),
        answered(None, "a dog"),
    ]
    found = metrics_of(everything)
    text = (REPOSITORY / "docs" / document).read_text(encoding="utf-8")
    first_columns = {
        name for row in re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE) for name in re.findall("`(.+?)`", row)
    }
    names = {key.partition("/")[0] for key in found}
    assert len(names) == 41 and names <= first_columns, names - first_columns
    assert {key.partition("/")[2].partition("=")[0] for key in found if "/" in key} <= first_columns
    lower = set(re.findall(r"^\| `(\w+)` ↓", text, re.MULTILINE))
    assert lower == {name for name in LOWER_IS_BETTER if not name.startswith(AVERAGED)}
    assert {*PROTOCOLS} <= first_columns


def test_nothing_to_score() -> None:
    found = summarize_predictions([], NUM_PATCHES)
    assert found.metrics == {"num_present": 0, "num_absent": 0, "num_text": 0}
    assert found.curves == {"precision_recall": []}


@pytest.mark.parametrize(
    ("absent", "present", "threshold", "balanced", "auc"),
    [
        ([0.9, 0.8], [0.1, 0.2], 0.8, 1.0, 1.0),
        ([0.1], [0.9], 0.9, 0.0, 0.0),
        ([0.9, 0.4], [0.6, 0.1], 0.6, 0.5, 0.75),
        ([0.5], [0.5], 0.0, 0.5, 0.5),
        ([0.9, 0.7, 0.5, 0.3], [0.6, 0.2, 0.1, 0.1], 0.5, 0.75, 14 / 16),
    ],
)
def test_threshold(absent: list[float], present: list[float], threshold: float, balanced: float, auc: float) -> None:
    curve = not_found_curve(absent, present)
    assert curve is not None
    assert (curve.threshold, curve.balanced_acc, curve.auc) == (threshold, balanced, auc)
    for at, n_acc, t_acc in curve.points:
        assert n_acc == pytest.approx(np.mean([prob >= at for prob in absent]))
        assert t_acc == pytest.approx(np.mean([prob < at for prob in present]))
    assert [curve.points[0][1:], curve.points[-1][1:]] == [[1, 0], [0, 1]]


def test_the_curve_needs_both_kinds_and_stays_short() -> None:
    assert not_found_curve([], [0.5]) is None and not_found_curve([0.5], []) is None
    rng = np.random.default_rng(1)
    curve = not_found_curve(rng.random(5000).tolist(), rng.random(5000).tolist())
    assert curve is not None and len(curve.points) <= 201
    assert curve.auc == pytest.approx(0.5, abs=0.02) == curve.balanced_acc


def test_the_threshold_is_among_the_metrics_of_all_and_of_groups() -> None:
    known = [answered([], "none", not_found_prob=0.9), answered([BIG], "?", not_found_prob=0.2, language="zh")]
    found = summarize_predictions(known, NUM_PATCHES)
    assert (found.metrics["not_found_threshold"], found.metrics["not_found_balanced_acc"]) == (0.9, 1)
    assert found.metrics["not_found_auc/source=a.json"] == 1 and "not_found_auc/language=zh" not in found.metrics
    assert found.curves["not_found"][0] == [0, 1, 0]
    unknown = summarize_predictions([answered([], "none"), answered([BIG], "?")], NUM_PATCHES)
    assert "not_found_threshold" not in unknown.metrics and "not_found" not in unknown.curves
