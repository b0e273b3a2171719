"""Metrics of an evaluation, over all answers and over every group of them: `acc@0.5`, `acc@0.5/share=under_1`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from cogvlm_ft.grounding.average_precision import (
    ANY_AREA,
    COCO_AREAS_PX2,
    RankedBoxes,
    average_precision,
    precision_recall_curve,
    rank_boxes,
)
from cogvlm_ft.grounding.descriptions import description_metrics, text_without_boxes
from cogvlm_ft.grounding.metrics import ABSENT, HIT, PRESENT, match_iou, summarize
from cogvlm_ft.grounding.not_found import NotFoundCurve, not_found_curve
from cogvlm_ft.grounding.prediction import Prediction, ranked_boxes
from cogvlm_ft.grounding.protocols import OURS, Protocol
from cogvlm_ft.grounding.targets import Box

MAX_SOURCES = 20
# Upper bounds; the last class has none.
SHARES = ((0.01, "under_1"), (0.03, "1_to_3"), (0.10, "3_to_10"), (np.inf, "over_10"))
PATCHES = ((1.0, "under_1"), (4.0, "1_to_4"), (np.inf, "over_4"))
TOTAL_ONLY = ("mean_diou", "mean_ciou")
EXPECTED = "_expected"

_POSITION = re.compile(r"(:\d+|\[\d+\]).*$")
_NOT_IN_NAMES = re.compile(r"[^\w.*+-]+")


@dataclass(frozen=True)
class Summary:
    """metrics: flat; those of a group have the suffix `/group=value`. curves: lists of points, for charts."""

    metrics: dict[str, float]
    curves: dict[str, Any]


@dataclass(frozen=True)
class _Boxes:
    """Results computed once per prediction, by its id, for all groups it is in. Empty unless `protocol.every_box`."""

    ranked: dict[int, RankedBoxes]
    expected_iou: dict[int, float]


def summarize_predictions(predictions: Sequence[Prediction], num_patches: int, protocol: Protocol = OURS) -> Summary:
    """Compute the metrics of all predictions and of every group.

    num_patches: of one image, at the resolution it was shown at.
    """
    boxes = _Boxes({}, {})
    if protocol.every_box:
        ranked = {id(each): _rank(each) for each in predictions if _is_ranked(each)}
        boxes = _Boxes(ranked, _expected_iou(predictions))
    metrics = _metrics(predictions, boxes, protocol)
    for group, members in _groups(predictions, num_patches).items():
        split = _metrics(members, boxes, protocol)
        metrics |= {f"{name}/{group}": value for name, value in split.items() if _is_split(name, group)}
    if protocol.every_box:
        metrics |= _precision_by_size(predictions)
    curves: dict[str, Any] = {"precision_recall": precision_recall_curve(list(boxes.ranked.values()))}
    curve = _not_found(predictions)
    return Summary(metrics, curves | ({"not_found": curve.points} if curve else {}))


def _is_split(name: str, group: str) -> bool:
    """Return whether a metric is reported for a group. COCO's sizes are of boxes: see `_precision_by_size`."""
    return name not in TOTAL_ONLY and not (group.startswith("size=") and re.fullmatch(r"a[pr]\d*", name))


def _precision_by_size(predictions: Sequence[Prediction]) -> dict[str, float]:
    found: dict[str, float] = {}
    for size, area_px2 in COCO_AREAS_PX2.items():
        by_size = average_precision([_rank(each, area_px2) for each in predictions if _is_ranked(each)])
        found |= {f"{name}/size={size}": value for name, value in by_size.items()}
    return found


def _metrics(predictions: Sequence[Prediction], boxes: _Boxes, protocol: Protocol) -> dict[str, float]:
    metrics = summarize([each.score for each in predictions if each.score], protocol)
    if predictions:
        metrics["truncated"] = float(np.mean([each.truncated for each in predictions]))
    metrics |= average_precision([boxes.ranked[id(each)] for each in predictions if id(each) in boxes.ranked])
    expected = [boxes.expected_iou[id(each)] for each in predictions if id(each) in boxes.expected_iou]
    if expected:
        metrics |= {f"mean_iou{EXPECTED}": float(np.mean(expected))}
        metrics |= {f"acc@{HIT:g}{EXPECTED}": float(np.mean(np.array(expected) >= HIT))}
    described = [each for each in predictions if each.described]
    metrics |= description_metrics(
        [text_without_boxes(each.answer) for each in described],
        [text_without_boxes(each.truth) for each in described],
        [each.language for each in described],
    )
    curve = _not_found(predictions)
    return metrics | (curve.metrics() if curve else {})


def _expected_iou(predictions: Sequence[Prediction]) -> dict[int, float]:
    """Return the IoU of the expected boxes (`ReadBox.expected`) by the id of each prediction.

    Covers all questions about present targets, or none if no expected box is known.
    """
    present = [each for each in predictions if each.score and each.score.kind == PRESENT]
    if all(each.expected_boxes_xyxy is None for each in present):
        return {}
    return {
        id(each): match_iou(each.expected_boxes_xyxy or [], each.truth_boxes_xyxy or [], each.num_cut_boxes)
        for each in present
    }


def _not_found(predictions: Sequence[Prediction]) -> NotFoundCurve | None:
    """Compute the curve over all answers with a known probability."""
    probs: dict[str, list[float]] = {ABSENT: [], PRESENT: []}
    for each in predictions:
        if each.score and each.score.kind in probs and each.not_found_prob is not None:
            probs[each.score.kind].append(each.not_found_prob)
    return not_found_curve(probs[ABSENT], probs[PRESENT])


def _is_ranked(each: Prediction) -> bool:
    """Return whether the prediction counts for AP. One with a cut list has no boxes that must be found."""
    return each.score is not None and each.score.kind in (PRESENT, ABSENT) and not each.num_cut_boxes


def _rank(each: Prediction, area_px2: tuple[float, float] = ANY_AREA) -> RankedBoxes:
    return rank_boxes(*ranked_boxes(each), each.truth_boxes_xyxy or [], area_px2)


def _groups(predictions: Sequence[Prediction], num_patches: int) -> dict[str, list[Prediction]]:
    """Return `name=value` -> its members, sorted by name.

    A group that contains everything is included, so that runs have the same metrics.
    """
    sources, groups = _source_names(predictions), dict[str, list[Prediction]]()
    for each in predictions:
        for name, value in _values(each, num_patches, sources):
            groups.setdefault(f"{name}={value}", []).append(each)
    return dict(sorted(groups.items()))


def _values(each: Prediction, num_patches: int, sources: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    yield "language", each.language or "unknown"
    yield "source", sources[each.source]
    yield "template", each.style or "unknown"
    truth = each.truth_boxes_xyxy
    if truth is None:
        return
    yield "targets", str(len(truth)) if len(truth) < 2 else "2+"
    if truth:
        yield from size_classes(truth, each.image_size_px, each.frame_px, num_patches)


def size_classes(
    truth: Sequence[Box], image_size_px: tuple[int, int], frame_px: tuple[int, int], num_patches: int
) -> list[tuple[str, str]]:
    """Classify the size of the target in three ways; the median area counts if there are several boxes.

    size: COCO's, in pixels of the stored image. share: the square root of the fraction of the image's area. patches:
    how many of the model's patches the area covers.
    """
    areas = [max(x1 - x0, 0.0) * max(y1 - y0, 0.0) for x0, y0, x1, y1 in truth]
    area, image, frame = float(np.median(areas)), float(np.prod(image_size_px)), float(np.prod(frame_px))
    found = [("size", next(name for name, (_, most) in COCO_AREAS_PX2.items() if area < most or name == "large"))]
    found.append(("share", _class_of((area / image) ** 0.5, SHARES)))
    if frame and num_patches:
        found.append(("patches", _class_of(area / frame * num_patches, PATCHES)))
    return found


def _class_of(value: float, classes: Sequence[tuple[float, str]]) -> str:
    return next(name for bound, name in classes if value < bound)


def source_file(source: str) -> str:
    """Return the annotation file of a source, without the position in it."""
    return _POSITION.sub("", source)


def _source_names(predictions: Sequence[Prediction]) -> dict[str, str]:
    """Return the name of each source in metric names.

    That is the annotation file; with more than MAX_SOURCES of them, its folder and suffix; then `others` for small
    ones.
    """
    names = {source: source_file(source) or "unknown" for source in {each.source for each in predictions}}
    if len(set(names.values())) > MAX_SOURCES:
        names = {
            source: str(PurePosixPath(name).with_name(f"*{PurePosixPath(name).suffix}"))
            for source, name in names.items()
        }
    sizes = Counter(names[each.source] for each in predictions)
    kept = {name for name, _ in sizes.most_common(MAX_SOURCES)}
    return {source: _NOT_IN_NAMES.sub("_", name) if name in kept else "others" for source, name in names.items()}
