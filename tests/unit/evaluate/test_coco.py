"""An evaluation as COCO files, scored by COCOeval."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cogvlm_ft.evaluate.coco import RESULTS_FILE, TRUTH_FILE, save_coco
from cogvlm_ft.grounding.metrics import score_answer
from cogvlm_ft.grounding.prediction import Prediction
from cogvlm_ft.grounding.targets import Box

SIZE = (200, 90)


def prediction(
    key: str,
    phrase: str,
    truth: list[Box] | None,
    found: list[Box] | None,
    confidences: list[float] | None = None,
    *,
    scored: bool = True,
) -> Prediction:
    score = score_answer("", truth, SIZE, ("no",), "") if scored else None
    return Prediction(
        key, 0, f"where is {phrase}?", "", "", found, truth, SIZE, score, confidences=confidences, phrase=phrase
    )


def average_precision(folder: Path) -> float:
    truth = COCO(str(folder / TRUTH_FILE))
    scored = COCOeval(truth, truth.loadRes(str(folder / RESULTS_FILE)), "bbox")
    scored.evaluate()
    scored.accumulate()
    scored.summarize()
    return float(scored.stats[1])  # at an IoU of 0.5


A, B, FAR = (10.0, 20.0, 110.0, 50.0), (120.0, 5.0, 180.5, 85.0), (0.0, 60.0, 9.0, 90.0)


def test_pycocotools_scores_what_is_saved(tmp_path: Path) -> None:
    save_coco(
        [
            prediction("x", "dog", [A, B], [A, FAR, B], [0.9, 0.2, 0.8]),
            prediction("x", "dog", [A, B], [FAR], [0.9]),  # asked again, in other words
            prediction("y", "dog", [], None),
            prediction("y", "狗", [B], [B]),
            prediction("y", "text", None, [B]),
            prediction("y", "cat", [A], [A], scored=False),
        ],
        tmp_path,
    )
    truth = json.loads((tmp_path / TRUTH_FILE).read_text(encoding="utf-8"))
    assert [image["file_name"] for image in truth["images"]] == ["x", "y"]
    assert all((image["width"], image["height"]) == SIZE for image in truth["images"])
    assert [category["name"] for category in truth["categories"]] == ["dog", "狗"]
    assert [annotation["bbox"] for annotation in truth["annotations"]] == [
        [10, 20, 100, 30],
        [120, 5, 60.5, 80],
        [120, 5, 60.5, 80],
    ]
    results = json.loads((tmp_path / RESULTS_FILE).read_text(encoding="utf-8"))
    assert [result["score"] for result in results] == [0.9, 0.2, 0.8, 1.0]
    assert average_precision(tmp_path) == pytest.approx(1.0)


def test_a_false_box_of_an_absent_target_costs(tmp_path: Path) -> None:
    save_coco([prediction("x", "dog", [A], [A], [0.5]), prediction("y", "dog", [], [B], [0.9])], tmp_path)
    assert average_precision(tmp_path) == pytest.approx(0.5)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("xyz"), st.sampled_from(["dog", "狗", "c"]), st.lists(st.sampled_from([A, B]))),
        min_size=1,
    )
)
def test_every_true_answer_scores_one(
    tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[str, str, list[Box]]]
) -> None:
    once = {(key, phrase): list(dict.fromkeys(boxes)) for key, phrase, boxes in asked}
    folder = tmp_path_factory.mktemp("coco")
    save_coco([prediction(key, phrase, boxes, boxes) for (key, phrase), boxes in once.items()], folder)
    if any(once.values()):
        assert average_precision(folder) == pytest.approx(1.0)
