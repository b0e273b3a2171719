"""Boxes of another meaning are recognised by all boxes together, and good boxes are never doubted."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogvlm_ft.shards.formats import FORMATS
from cogvlm_ft.shards.packing.candidates import Candidate
from cogvlm_ft.shards.review import review
from cogvlm_ft.shards.reviewing.readings import Boxes, Tally, boxes_of, count_readings, judge_readings
from cogvlm_ft.shards.reviewing.settings import ReviewSettings
from cogvlm_ft.shards.reviewing.sources import annotated_items

COCO = Path(__file__).parents[3].parent / "shared" / "data" / "coco128_train"
needs_data = pytest.mark.skipif(not COCO.is_dir(), reason=f"the real photos are not in {COCO}")

SIZES = ((640, 480), (480, 640), (500, 375), (333, 500))


def random_photos(seed: int, sizes: tuple[tuple[int, int], ...] = SIZES) -> list[tuple[Boxes, tuple[int, int]]]:
    """Boxes in pixels, and the size of their photo."""
    rng = random.Random(seed)
    photos = []
    for _ in range(25):
        width, height = rng.choice(sizes)
        boxes = []
        for _ in range(rng.randint(1, 4)):
            x0, y0 = rng.uniform(0, 0.9 * width), rng.uniform(0, 0.9 * height)
            boxes.append((x0, y0, rng.uniform(x0 + 4, width), rng.uniform(y0 + 4, height)))
        photos.append((np.array(boxes), (width, height)))
    return photos


def real_photos() -> list[tuple[Boxes, tuple[int, int]]]:
    parts = FORMATS["coco"].read(COCO / "coco_json" / "instances_train2017.json", COCO)
    return [
        (boxes_of(part), part.stated_size_px)
        for part in parts
        if isinstance(part, Candidate) and part.targets and part.stated_size_px
    ]


def per_side(boxes: Boxes, size: tuple[int, int], one: float) -> Boxes:
    return boxes / np.array([*size, *size]) * one


def xywh(boxes: Boxes) -> Boxes:
    return np.column_stack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])


MEANINGS: dict[str, tuple[Any, str, set[str]]] = {
    "good": (lambda b, s: b, "pixels", set()),
    "xywh": (lambda b, s: xywh(b), "pixels", {"looks_like_xywh"}),
    "corners": (lambda b, s: np.column_stack([b[:, :2], b[:, :2] + b[:, 2:]]), "pixels", {"looks_like_xyxy"}),
    "swapped": (lambda b, s: b[:, [1, 0, 3, 2]], "pixels", {"axes_swapped"}),
    "unit": (lambda b, s: per_side(b, s, 1), "pixels", {"looks_normalised"}),
    "unit xywh": (lambda b, s: per_side(xywh(b), s, 1), "pixels", {"looks_normalised", "looks_like_xywh"}),
    "thousandths": (lambda b, s: per_side(b, s, 1000), "pixels", {"looks_like_thousandths"}),
    "thousandths xywh": (
        lambda b, s: per_side(xywh(b), s, 1000),
        "pixels",
        {"looks_like_thousandths", "looks_like_xywh"},
    ),
    "good unit": (lambda b, s: per_side(b, s, 1), "unit", set()),
    "pixels for unit": (lambda b, s: b, "unit", {"looks_like_pixels"}),
    "thousandths for unit": (lambda b, s: per_side(b, s, 1000), "unit", {"looks_like_thousandths"}),
    "good thousandths": (lambda b, s: per_side(b, s, 1000), "thousandths", set()),
}


def judged(photos: list[tuple[Boxes, tuple[int, int]]], meaning: str) -> set[str]:
    change, units, _ = MEANINGS[meaning]
    tally: Tally = Counter()
    for boxes, size in photos:
        tally.update(count_readings(change(boxes, size), units, size)[0])
    return {kind for kind, _, _, _ in judge_readings(tally)}


@pytest.mark.slow
@pytest.mark.parametrize("meaning", MEANINGS)
@pytest.mark.parametrize("seed", range(5))
def test_made_boxes(meaning: str, seed: int) -> None:
    assert judged(random_photos(seed), meaning) == MEANINGS[meaning][2]


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("meaning", MEANINGS)
def test_real_boxes(meaning: str) -> None:
    assert judged(real_photos(), meaning) == MEANINGS[meaning][2]


@pytest.mark.parametrize("meaning", ["good", "thousandths"])
def test_thousandths_in_photos_so_large_that_they_fit(meaning: str) -> None:
    assert judged(random_photos(0, ((1920, 1080), (2000, 3000))), meaning) == MEANINGS[meaning][2]


@pytest.mark.parametrize("num_bad", [1, 2, 5])
def test_a_few_errors_do_not_make_a_source_suspicious(num_bad: int) -> None:
    photos = random_photos(1)
    for boxes, _ in photos[:num_bad]:
        boxes[0] = boxes[0][[2, 1, 0, 3]]
    assert judged(photos, "good") == set()


def test_two_boxes_are_too_few_to_judge_a_source() -> None:
    assert judged([(np.array([[300.0, 3, 9, 25], [200, 100, 50, 50]]), (400, 300))], "good") == set()


@pytest.mark.slow
@needs_data
def test_the_page_shows_examples_and_says_why(tmp_path: Path) -> None:
    lines = []
    for part in FORMATS["coco"].read(COCO / "coco_json" / "instances_train2017.json", COCO):
        if isinstance(part, Candidate) and part.targets:
            targets = [{"phrase": t.phrase, "boxes": xywh(np.array(t.boxes_xyxy)).tolist()} for t in part.targets]
            lines.append(json.dumps({"image": part.image, "targets": targets}))
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    source = annotated_items("jsonl", tmp_path / "lines.jsonl", COCO / "images" / "train2017")
    review(source, "xywh", tmp_path, ReviewSettings(max_pictures=15))
    suspects = [json.loads(line) for line in (tmp_path / "suspects.jsonl").read_bytes().splitlines()]
    (whole,) = [suspect for suspect in suspects if suspect["level"] == "source"]
    assert whole["kind"] == "looks_like_xywh"
    assert len(whole["photos"]) == 3
    assert "of 929 boxes" in whole["detail"] and "Read as x,y,w,h, px, 100% of all boxes fit" in whole["detail"]
    assert "Looks like x, y, width, height" in (tmp_path / "review.html").read_text(encoding="utf-8")
