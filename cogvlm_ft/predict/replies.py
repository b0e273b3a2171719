"""The reply of a model to one question about a photo, and how the replies about its tiles are merged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cogvlm_ft.data.frames import Frame
from cogvlm_ft.evaluate.scoring import merged_text, shown_window
from cogvlm_ft.grounding.confidence import KeptBoxes
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.grounding.tile_answers import TileAnswer, merge_answers


@dataclass(frozen=True)
class FoundBox:
    """xyxy: pixels of the photo. confidence: mean probability of its digits, None if unknown; of a box from tiles
    times the probability that the answer is not "not found".

    phrase: its target, where that is known. zoomed: from a second look.
    """

    xyxy: Box
    confidence: float | None = None
    phrase: str | None = None
    zoomed: bool = False


@dataclass(frozen=True)
class Reply:
    """boxes: None if the text holds no readable ones. The text is that of the first look.

    truncated: the text was cut at the limit of new tokens; boxes are those that it had closed.
    num_duplicates: boxes of several tiles that were merged into those that are left. num_removed: boxes from tiles
    that do not count. num_looks: the whole photo and its tiles, as far as they were asked about.
    """

    prompt: str
    text: str
    boxes: tuple[FoundBox, ...] | None
    not_found: bool
    not_found_prob: float | None
    truncated: bool = False
    num_duplicates: int = 0
    num_removed: int = 0
    num_looks: int = 1


def merge_replies(
    frames: Sequence[Frame],
    replies: Sequence[Reply],
    num_patches: int,
    kept: KeptBoxes,
    not_found: Sequence[str],
) -> Reply:
    """Merge the replies to one question about a photo and its tiles; boxes are in pixels of the photo already.

    kept: which boxes count. not_found: sentences, as in `merged_text`.
    """
    if len(replies) == 1:
        return replies[0]
    size_px, side = frames[0].photo_px, math.isqrt(num_patches)
    answers = [
        TileAnswer(
            window=shown_window(frame),
            boxes=None if reply.boxes is None or reply.not_found else [box.xyxy for box in reply.boxes],
            confidences=[1.0 if box.confidence is None else box.confidence for box in reply.boxes or ()],
            patch_px=(frame.size_px[0] / side, frame.size_px[1] / side),
            not_found=reply.not_found,
            not_found_prob=reply.not_found_prob,
        )
        for frame, reply in zip(frames, replies, strict=True)
    ]
    merged = merge_answers(answers, size_px, kept)
    best = replies[merged.best]
    boxes = [FoundBox(*pair) for pair in zip(merged.boxes or (), merged.confidences, strict=True)]
    return replace(
        best,
        text=merged_text(best.prompt, best.text, merged, size_px, not_found),
        boxes=None if merged.boxes is None else tuple(boxes),
        not_found=merged.not_found,
        not_found_prob=merged.not_found_prob,
        truncated=any(reply.truncated for reply in replies),
        num_duplicates=merged.num_duplicates,
        num_removed=merged.num_removed,
        num_looks=len(replies),
    )
