"""Count the content of a source in one pass. Counts of its parts add up, so several processes can work on it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogvlm_ft.data.record import box_defect, clip_box
from cogvlm_ft.grounding.ceiling import best_iou
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.packing.candidates import Candidate
from cogvlm_ft.shards.reviewing.photo_rules import PATCH_PX
from cogvlm_ft.shards.reviewing.photos import Photo
from cogvlm_ft.shards.reviewing.readings import Tally, boxes_of, in_pixels
from cogvlm_ft.shards.reviewing.small_targets import compare, count_box, count_photo

IMAGE_SIZES = (224, 490, 756, 980)
WANTED_SHARE = 0.9
"""The recommended size is the smallest at which this fraction of boxes is at least one patch wide and high."""
WEIGHTS_SIZE = 490
"""Image size of the published weights for grounding. Smaller sizes are not recommended: they only lose accuracy."""

SIDE_EDGES_PX = (8, 16, 32, 64, 128, 256, 512, 1024)
SHARE_EDGES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Bin edges of the square root of box area / image area: 0.1 is a tenth of the width by a tenth of the height."""
PATCH_EDGES = (0.5, 1, 2, 4, 8, 16)
GROUP_EDGES = (0.01, 0.03, 0.1)
"""Edges of the size groups of the best possible IoU, in the same unit."""
COUNT_EDGES = (1, 2, 3, 4, 6, 11, 21)
_MAX_LENGTH = 60
_IOU_STEPS = 1000


def num_tokens(image_size: int) -> int:
    """Return the tokens of an image in the sequence: its patches, and the two tokens around them."""
    return (image_size // PATCH_PX) ** 2 + 2


def count_candidate(candidate: Candidate, photo: Photo | None, split: str | None) -> Tally:
    """Count one candidate; without its image only the texts."""
    tally: Tally = Counter({("samples",): 1, ("turns",): len(candidate.turns), ("split", split or ""): 1})
    for target in candidate.targets:
        tally["targets",] += 1
        tally["language", target.language] += 1
        tally["absent",] += not target.boxes_xyxy
        tally["described",] += target.description is not None
        tally["boxes",] += len(target.boxes_xyxy)
        tally["boxes per target", _bin(len(target.boxes_xyxy), COUNT_EDGES)] += 1
        length = len(target.phrase) if target.language == "zh" else len(target.phrase.split())
        tally["phrase length", target.language, min(length, _MAX_LENGTH)] += 1
    tally["targets per sample", _bin(len(candidate.targets), COUNT_EDGES)] += 1
    if photo:
        tally["photos",] = 1
        tally["photo side", _bin(max(photo.size_px), SIDE_EDGES_PX)] += 1
        count_photo(tally, photo.size_px)
        for box in in_pixels(boxes_of(candidate), candidate.units, photo.size_px).tolist():
            if box_defect(box, photo.size_px) is None:
                _count_box(tally, clip_box(box, photo.size_px), photo.size_px)
    return tally


def _count_box(tally: Tally, box: Box, image_size_px: tuple[int, int]) -> None:
    width, height = image_size_px
    box_width, box_height = box[2] - box[0], box[3] - box[1]
    root = math.sqrt(box_width * box_height / (width * height))
    tally["good boxes",] += 1
    tally["box side", _bin(math.sqrt(box_width * box_height), SIDE_EDGES_PX)] += 1
    tally["box share", _bin(root, SHARE_EDGES)] += 1
    shorter = min(box_width / width, box_height / height)
    for size in IMAGE_SIZES:
        tally["patches", size, _bin(shorter * size / PATCH_PX, PATCH_EDGES)] += 1
    count_box(tally, box, image_size_px, IMAGE_SIZES)
    iou = best_iou(box, image_size_px)
    group = _bin(root, GROUP_EDGES)
    tally["iou", group, round(iou * _IOU_STEPS)] += 1


def report_of(tally: Tally, weights_size: int = WEIGHTS_SIZE) -> dict[str, Any]:
    """Return the statistics for review.json. Fractions are None where the total is 0.

    weights_size: image size of the weights that training starts from, in px.
    """
    counts = ("samples", "photos", "targets", "absent", "described", "boxes", "good boxes", "turns")
    return {
        "counts": {name.replace(" ", "_"): tally[(name,)] for name in counts},
        "splits": _by_name(tally, "split"),
        "languages": _by_name(tally, "language"),
        "phrase_length": {language: _lengths(tally, language) for language in ("zh", "en")},
        "boxes_per_target": _histogram(tally, COUNT_EDGES, "boxes per target"),
        "targets_per_sample": _histogram(tally, COUNT_EDGES, "targets per sample"),
        "photo_longer_side_px": _histogram(tally, SIDE_EDGES_PX, "photo side"),
        "box_side_px": _histogram(tally, SIDE_EDGES_PX, "box side"),
        "box_share_of_side": _histogram(tally, SHARE_EDGES, "box share"),
        "image_sizes": {str(size): _at_size(tally, size) for size in IMAGE_SIZES},
        "recommended": recommend(tally, weights_size),
        "small_targets": compare(tally, weights_size, IMAGE_SIZES),
        "best_iou": {
            "all": _iou_report(tally, range(len(GROUP_EDGES) + 1)),
            **{label: _iou_report(tally, [group]) for group, label in enumerate(edge_labels(GROUP_EDGES))},
        },
    }


def recommend(tally: Tally, weights_size: int = WEIGHTS_SIZE) -> dict[str, Any]:
    """Return the smallest image size from that of the weights on at which nearly all boxes are visible.

    The largest if there is none.

    A box below one patch (14 px) on its shorter side shares the token with what is around it, so it is hard to find
    and harder to outline. A larger size costs tokens with its square, on every photo of every epoch.
    """
    shares = {size: _share_of_a_patch(tally, size) for size in IMAGE_SIZES if size >= weights_size}
    found: dict[str, Any] = {"image_size": None, "share": None, "wanted_share": WANTED_SHARE, "enough": False}
    if tally["good boxes",]:
        enough = [size for size, share in shares.items() if share is not None and share >= WANTED_SHARE]
        size = enough[0] if enough else IMAGE_SIZES[-1]
        found |= {"image_size": size, "share": shares[size], "enough": bool(enough)}
    return found | {"weights_size": weights_size}


def edge_labels(edges: Sequence[float]) -> list[str]:
    """Return the names of the bins between `edges`: "<8", "8-16", ..., ">=1024"; of counts: "0", "1", "2-3", ">=4"."""
    if edges is COUNT_EDGES:
        inner = [f"{low}" if high == low + 1 else f"{low}-{high - 1}" for low, high in pairwise(COUNT_EDGES)]
        return ["0", *inner, f">={edges[-1]}"]
    inner = [f"{low:g}-{high:g}" for low, high in pairwise(edges)]
    return [f"<{edges[0]:g}", *inner, f">={edges[-1]:g}"]


def _bin(value: float, edges: Sequence[float]) -> int:
    """Return the number of edges at or below the value."""
    return sum(edge <= value for edge in edges)


def _by_name(tally: Tally, name: str) -> dict[str, int]:
    return {key[1]: count for key, count in sorted(tally.items(), key=str) if key[0] == name and key[1] and count}


def _histogram(tally: Tally, edges: Sequence[float], *name: Any) -> dict[str, int]:
    return {label: tally[(*name, number)] for number, label in enumerate(edge_labels(edges))}


def _lengths(tally: Tally, language: str) -> dict[str, int]:
    """Count characters for Chinese and words for English; the last bin includes all longer texts."""
    return {
        str(n): tally["phrase length", language, n]
        for n in range(1, _MAX_LENGTH + 1)
        if tally["phrase length", language, n]
    }


def _at_size(tally: Tally, size: int) -> dict[str, Any]:
    return {
        "tokens": num_tokens(size),
        "share_of_boxes_at_least_one_patch": _share_of_a_patch(tally, size),
        "shorter_side_patches": _histogram(tally, PATCH_EDGES, "patches", size),
    }


def _share_of_a_patch(tally: Tally, size: int) -> float | None:
    boxes = tally["good boxes",]
    first = PATCH_EDGES.index(1) + 1
    seen = sum(tally["patches", size, number] for number in range(first, len(PATCH_EDGES) + 1))
    return seen / boxes if boxes else None


def _iou_report(tally: Tally, groups: Sequence[int]) -> dict[str, Any]:
    counts: NDArray[np.int64] = np.array(
        [sum(tally["iou", group, step] for group in groups) for step in range(_IOU_STEPS + 1)]
    )
    total = int(counts.sum())
    if not total:
        return {"boxes": 0, "mean": None, "percentile_5": None, "share_0.5": None, "share_0.75": None}
    ious = np.arange(_IOU_STEPS + 1) / _IOU_STEPS
    return {
        "boxes": total,
        "mean": round(float(counts @ ious / total), 4),
        "percentile_5": float(ious[np.searchsorted(np.cumsum(counts), 0.05 * total)]),
        "share_0.5": float(counts[ious >= 0.5].sum() / total),
        "share_0.75": float(counts[ious >= 0.75].sum() / total),
    }
