"""The highest scores that box text allows: its resolution is a thousand bins per side, so no answer is exact."""

from __future__ import annotations

from collections.abc import Sequence

from cogvlm_ft.grounding.boxes import bins_from_box, boxes_from_bins, format_boxes
from cogvlm_ft.grounding.metrics import match_iou
from cogvlm_ft.grounding.protocols import OURS, Protocol
from cogvlm_ft.grounding.targets import Box


def best_iou(box: Box, image_size_px: tuple[int, int]) -> float:
    """Return the IoU of a box with its own box text, parsed back."""
    ax0, ay0, ax1, ay1 = box
    bx0, by0, bx1, by1 = boxes_from_bins([bins_from_box(box, image_size_px)], image_size_px)[0].tolist()
    overlap = max(min(ax1, bx1) - max(ax0, bx0), 0.0) * max(min(ay1, by1) - max(ay0, by0), 0.0)
    union = (ax1 - ax0) * (ay1 - ay0) + max(bx1 - bx0, 0.0) * max(by1 - by0, 0.0) - overlap
    return overlap / union if union > 0 else 0.0


def best_answer_iou(truth_xyxy: Sequence[Box], image_size_px: tuple[int, int], protocol: Protocol = OURS) -> float:
    """Return the IoU of an answer with exactly the true boxes under a protocol. There is at least one true box."""
    answered = protocol.read(format_boxes(truth_xyxy, image_size_px), image_size_px) or []
    return match_iou(answered, protocol.truth(truth_xyxy, image_size_px))
