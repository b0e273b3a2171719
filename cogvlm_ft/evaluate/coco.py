"""An evaluation as COCO files: the truth and the answers, for COCOeval and tools that read COCO's results.

A category is a phrase; a question without a target is a category of its own. An image has the boxes of the phrases that
it was asked about.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cogvlm_ft.grounding.prediction import Prediction, ranked_boxes
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.plain_files import write_text

TRUTH_FILE, RESULTS_FILE = "coco_truth.json", "coco_results.json"


def coco_box(box: Box) -> dict[str, Any]:
    """Return the fields of a box: [x, y, width, height] in pixels."""
    x0, y0, x1, y1 = box
    width, height = max(0.0, x1 - x0), max(0.0, y1 - y0)
    bbox = [round(value, 2) for value in (x0, y0, width, height)]
    return {"bbox": bbox, "area": round(bbox[2] * bbox[3], 2), "iscrowd": 0}


def coco_categories(ids: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return the categories by their ids."""
    return [{"id": number, "name": name} for name, number in ids.items()]


def save_coco(predictions: Sequence[Prediction], folder: Path) -> None:
    """Save the truth as a COCO data set, and the answers as COCO results. Questions without true boxes are left out.

    A target that is asked about twice counts once.
    """
    asked = list(_asked_once(predictions))
    images = {each.key: each for _, each in asked}
    image_ids = {key: number for number, key in enumerate(images, 1)}
    category_ids = {phrase: number for number, phrase in enumerate(dict.fromkeys(phrase for phrase, _ in asked), 1)}
    truth: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for phrase, each in asked:
        where = {"image_id": image_ids[each.key], "category_id": category_ids[phrase]}
        truth += [{**where, **coco_box(box)} for box in each.truth_boxes_xyxy or ()]
        answered = zip(*ranked_boxes(each), strict=True)
        results += [{**where, "bbox": coco_box(box)["bbox"], "score": score} for box, score in answered]
    data_set = {
        "info": {"description": "what the evaluation asked about"},
        "images": [_image(image_ids[key], each) for key, each in images.items()],
        "categories": coco_categories(category_ids),
        "annotations": [{"id": number, **annotation} for number, annotation in enumerate(truth, 1)],
    }
    for name, content in ((TRUTH_FILE, data_set), (RESULTS_FILE, results)):
        write_text(folder / name, json.dumps(content, ensure_ascii=False) + "\n")


def _asked_once(predictions: Iterable[Prediction]) -> Iterable[tuple[str, Prediction]]:
    """Yield (phrase, prediction) of the scored questions about boxes, one of those that are equal."""
    seen = set()
    for each in predictions:
        if each.truth_boxes_xyxy is not None and each.score is not None:
            phrase = each.phrase or each.prompt
            same = each.key, phrase, tuple(map(tuple, each.truth_boxes_xyxy))
            if same not in seen:
                seen.add(same)
                yield phrase, each


def _image(number: int, each: Prediction) -> dict[str, Any]:
    width, height = each.image_size_px
    return {"id": number, "file_name": each.key, "width": width, "height": height}
