"""Score the answers to the questions about a photo, each given about the whole of it or about several tiles."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cogvlm_ft.data.frames import Frame
from cogvlm_ft.data.record import clip_box, detect_language
from cogvlm_ft.evaluate.generate import Answer
from cogvlm_ft.evaluate.looks import Look
from cogvlm_ft.evaluate.questions import Question, in_pixels, truth_boxes
from cogvlm_ft.grounding.boxes import format_boxes, read_boxes
from cogvlm_ft.grounding.descriptions import text_without_boxes
from cogvlm_ft.grounding.metrics import PRESENT, score_answer, score_boxes
from cogvlm_ft.grounding.prediction import Prediction
from cogvlm_ft.grounding.protocols import Protocol
from cogvlm_ft.grounding.targets import Box, Turn
from cogvlm_ft.grounding.tile_answers import MergedAnswer, TileAnswer, merge_answers
from cogvlm_ft.grounding.tiles import Window
from cogvlm_ft.grounding.wording import Wording

_BOXES = re.compile(r"\[\[[0-9,;]*\]\]")


@dataclass(frozen=True)
class MergeFacts:
    """What merging did to the answers about one photo.

    num_duplicates: boxes that it removed. ious: of every question about a present target, (merged, all boxes of all
    answers, the whole photo's answer alone; NaN if it was not asked).
    """

    num_duplicates: int
    ious: tuple[tuple[float, float, float], ...]


def score_looks(
    looks: Sequence[Look], answers: Sequence[Sequence[Answer]], wording: Wording, protocol: Protocol, num_patches: int
) -> tuple[list[Prediction], MergeFacts | None]:
    """Score all questions about a photo. answers: one row for each look. The facts are None without tiles."""
    question = looks[0].question
    by_turn: dict[int, list[tuple[Look, Answer]]] = {}
    for look, row in zip(looks, answers, strict=True):
        for number, answer in zip(look.numbers, row, strict=True):
            by_turn.setdefault(number, []).append((look, answer))
    predictions, ious, num_duplicates = list[Prediction](), list[tuple[float, float, float]](), 0
    for number, given in sorted(by_turn.items()):
        whole = next((answer for look, answer in given if look.frame == question.frame), None)
        alone = None if whole is None else score_turn(question, number, whole, wording, protocol)
        if alone is not None and len(given) == 1:
            predictions.append(alone)
            continue
        tiles = [_tile_answer(look.frame, answer, wording, protocol, num_patches) for look, answer in given]
        merged = merge_answers(tiles, question.frame.photo_px)
        predictions.append(_merged_prediction(question, number, given, merged, wording, protocol))
        num_duplicates += merged.num_duplicates
        ious += _ious(predictions[-1], tiles, alone)
    facts = MergeFacts(num_duplicates, tuple(ious)) if len(looks) > 1 else None
    return predictions, facts


def summarize_merging(facts: Sequence[MergeFacts]) -> dict[str, float]:
    """Return the metrics of merging over all photos with tiles; {} if there are none."""
    if not facts:
        return {}
    found = {"tile_duplicates": sum(each.num_duplicates for each in facts) / len(facts)}
    ious = np.array([row for each in facts for row in each.ious]).reshape(-1, 3)
    if len(ious):
        found["tile_merge_gain"] = float((ious[:, 0] - ious[:, 1]).mean())
    beside = ious[~np.isnan(ious[:, 2])]
    return found | ({"tile_gain": float((beside[:, 0] - beside[:, 2]).mean())} if len(beside) else {})


def _ious(
    merged: Prediction, tiles: Sequence[TileAnswer], alone: Prediction | None
) -> list[tuple[float, float, float]]:
    if merged.score is None or merged.score.kind != PRESENT or not merged.truth_boxes_xyxy:
        return []
    boxes = [box for each in tiles for box in each.boxes or ()]
    every = score_boxes(boxes, False, merged.truth_boxes_xyxy, merged.num_cut_boxes)
    whole = math.nan if alone is None or alone.score is None else alone.score.iou
    return [(merged.score.iou, every.iou, whole)]


def _tile_answer(frame: Frame, answer: Answer, wording: Wording, protocol: Protocol, num_patches: int) -> TileAnswer:
    """Read an answer about a part of the photo, in pixels of the photo."""
    closed = answer.readable()
    text, side = closed.text.strip(), math.isqrt(num_patches)
    not_found = text in wording.not_found_sentences
    boxes = None if not_found else protocol.read(text, frame.size_px)
    read = read_boxes(closed.text, closed.digit_probs)
    known = read is not None and boxes is not None and len(read) == len(boxes)
    return TileAnswer(
        window=shown_window(frame),
        boxes=None if boxes is None else [clip_box(box, frame.photo_px) for box in frame.invert_boxes(boxes)],
        confidences=[box.confidence for box in read] if read and known else [1.0] * len(boxes or ()),
        patch_px=(frame.size_px[0] / side, frame.size_px[1] / side),
        not_found=not_found,
        not_found_prob=answer.not_found_prob,
    )


def shown_window(frame: Frame) -> Window:
    """Return what a frame shows of the photo, without the grey beyond its edges."""
    (x0, y0, x1, y1), (width, height) = frame.window_px, frame.photo_px
    return max(0, x0), max(0, y0), min(width, x1), min(height, y1)


def merged_text(text: str, merged: MergedAnswer, size_px: tuple[int, int]) -> str:
    """Return the text of an answer about a tile with the merged boxes, in thousandths of the photo."""
    if not merged.boxes:
        return text
    boxes = format_boxes(merged.boxes, size_px)
    first, *others = _BOXES.split(text)
    return first + boxes + "".join(others) if others else boxes


def _merged_prediction(
    question: Question,
    number: int,
    given: Sequence[tuple[Look, Answer]],
    merged: MergedAnswer,
    wording: Wording,
    protocol: Protocol,
) -> Prediction:
    """Score merged boxes in pixels of the photo: thousandths of a large photo are too coarse for a small target."""
    best, size_px = given[merged.best][1], question.frame.photo_px
    text = merged_text(best.readable().text, merged, size_px)
    base = score_turn(question, number, replace(best, text=text, digit_probs=(), truncated=False), wording, protocol)
    truth = base.truth_boxes_xyxy
    assert truth is not None  # else it is not asked in tiles
    score = score_boxes(merged.boxes, merged.not_found, truth, question.turns[number].num_cut_boxes, protocol, size_px)
    prob = merged.not_found_prob
    return replace(
        base,
        boxes_xyxy=None if merged.not_found or merged.boxes is None else merged.boxes,
        score=None if base.score is None else score,
        confidences=[round(each, 4) for each in merged.confidences] if merged.boxes else None,
        expected_boxes_xyxy=None,
        not_found_prob=None if prob is None else round(prob, 4),
        truncated=any(answer.truncated for _, answer in given),
    )


def score_turn(question: Question, number: int, answer: Answer, wording: Wording, protocol: Protocol) -> Prediction:
    """Score an answer in the frame, where a pixel is as large as in the original image."""
    turn, frame, size = question.turns[number], question.frame, question.frame.size_px
    not_found = wording.not_found_sentences
    truth = truth_boxes(turn, size, not_found)
    closed = answer.readable()
    read = read_boxes(closed.text, closed.digit_probs)
    boxes = protocol.read(closed.text.strip(), size)
    score = score_answer(closed.text, truth, size, not_found, turn.answer, turn.num_cut_boxes, protocol)
    return Prediction(
        key=question.key,
        turn=number,
        prompt=turn.prompt,
        answer=answer.text,
        truth=turn.answer,
        boxes_xyxy=None if boxes is None else list(frame.invert_boxes(boxes)),
        truth_boxes_xyxy=None if truth is None else list(frame.invert_boxes(truth)),
        image_size_px=frame.photo_px,
        score=score if turn.scored and protocol.takes(truth) else None,
        history=turn.history,
        num_cut_boxes=turn.num_cut_boxes,
        confidences=None if read is None else [round(box.confidence, 4) for box in read],
        expected_boxes_xyxy=None
        if read is None
        else list(frame.invert_boxes(in_pixels([box.expected for box in read], size))),
        not_found_prob=None if answer.not_found_prob is None else round(answer.not_found_prob, 4),
        described=_is_described(turn, truth),
        language=turn.target.language if turn.target else detect_language(turn.prompt + turn.answer),
        source=question.source,
        style=turn.style,
        frame_px=size,
        phrase=turn.target.phrase if turn.target else "",
        truncated=answer.truncated,
    )


def _is_described(turn: Turn, truth: Sequence[Box] | None) -> bool:
    """Decide whether the true answer describes the target, beyond the sentence around its boxes."""
    if not turn.scored or truth is None:
        return True
    if turn.target is None:
        return bool(truth and text_without_boxes(turn.answer))
    return bool(turn.target.description and turn.target.description in turn.answer)
