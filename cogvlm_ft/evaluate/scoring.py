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
from cogvlm_ft.grounding.average_precision import RankedBoxes, rank_boxes
from cogvlm_ft.grounding.boxes import format_boxes, read_boxes
from cogvlm_ft.grounding.confidence import KeptBoxes
from cogvlm_ft.grounding.descriptions import text_without_boxes
from cogvlm_ft.grounding.metrics import PRESENT, score_answer, score_boxes
from cogvlm_ft.grounding.prediction import Prediction
from cogvlm_ft.grounding.protocols import Protocol
from cogvlm_ft.grounding.targets import Box, Turn
from cogvlm_ft.grounding.tile_answers import EVERY_BOX, MergedAnswer, TileAnswer, merge_answers
from cogvlm_ft.grounding.tiles import Window
from cogvlm_ft.grounding.wording import Wording

_BOXES = re.compile(r"\[\[[0-9,;]*\]\]")


@dataclass(frozen=True)
class MergeFacts:
    """The effect of merging on the answers about one photo.

    num_duplicates: boxes that it removed. num_removed: boxes that do not count. ious: of every question about a
    present target, (merged, all boxes of all answers, the whole photo's answer alone; NaN if it was not asked).
    """

    num_duplicates: int
    num_removed: int
    ious: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Reading:
    """How answers are read and scored. num_patches: of the model's input. kept: of the boxes from tiles."""

    wording: Wording
    protocol: Protocol
    num_patches: int
    kept: KeptBoxes = EVERY_BOX


Given = Sequence[tuple[Look, Answer]]
"""One question's answers about all looks at which it was asked."""


def score_looks(
    looks: Sequence[Look], answers: Sequence[Sequence[Answer]], reading: Reading
) -> tuple[list[Prediction], MergeFacts | None]:
    """Score all questions about a photo. answers: one row for each look. The facts are None without tiles."""
    question = looks[0].question
    predictions, ious, num_duplicates, num_removed = list[Prediction](), list[tuple[float, float, float]](), 0, 0
    for number, given in _by_turn(looks, answers):
        whole = next((answer for look, answer in given if look.frame == question.frame), None)
        alone = None if whole is None else score_turn(question, number, whole, reading.wording, reading.protocol)
        if alone is not None and len(given) == 1:
            predictions.append(alone)
            continue
        tiles = [_tile_answer(look.frame, answer, reading) for look, answer in given]
        merged = merge_answers(tiles, question.frame.photo_px, reading.kept)
        predictions.append(_merged_prediction(question, number, given, merged, reading))
        num_duplicates += merged.num_duplicates
        num_removed += merged.num_removed
        ious += _ious(predictions[-1], tiles, alone)
    return predictions, MergeFacts(num_duplicates, num_removed, tuple(ious)) if len(looks) > 1 else None


def rank_merged(looks: Sequence[Look], answers: Sequence[Sequence[Answer]], reading: Reading) -> list[RankedBoxes]:
    """Match the boxes of the questions about a photo that are asked about several looks, whatever their confidence."""
    question, found = looks[0].question, []
    for number, given in _by_turn(looks, answers):
        turn = question.turns[number]
        truth = truth_boxes(turn, question.frame.size_px, reading.wording.not_found_sentences)
        if len(given) == 1 or truth is None or turn.num_cut_boxes or not reading.protocol.takes(truth):
            continue
        tiles = [_tile_answer(look.frame, answer, reading) for look, answer in given]
        merged = merge_answers(tiles, question.frame.photo_px)
        found.append(rank_boxes(merged.boxes or [], merged.confidences, list(question.frame.invert_boxes(truth))))
    return found


def _by_turn(looks: Sequence[Look], answers: Sequence[Sequence[Answer]]) -> list[tuple[int, Given]]:
    """Return the number of every question about a photo with its answers about all looks."""
    found: dict[int, list[tuple[Look, Answer]]] = {}
    for look, row in zip(looks, answers, strict=True):
        for number, answer in zip(look.numbers, row, strict=True):
            found.setdefault(number, []).append((look, answer))
    return sorted(found.items())


def summarize_merging(facts: Sequence[MergeFacts], reading: Reading) -> dict[str, float]:
    """Return the metrics of merging over all photos with tiles; {} if there are none."""
    if not facts:
        return {}
    found = {
        "tile_duplicates": sum(each.num_duplicates for each in facts) / len(facts),
        "tile_removed": sum(each.num_removed for each in facts) / len(facts),
        "tile_min_confidence": reading.kept.min_confidence,
        "tile_only_best": float(reading.kept.only_best),
    }
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


def _tile_answer(frame: Frame, answer: Answer, reading: Reading) -> TileAnswer:
    """Read an answer about a part of the photo, in pixels of the photo."""
    closed = answer.readable()
    text, side = closed.text.strip(), math.isqrt(reading.num_patches)
    not_found = text in reading.wording.not_found_sentences
    boxes = None if not_found else reading.protocol.read(text, frame.size_px)
    read = read_boxes(closed.text, closed.digit_probs)
    known = read is not None and boxes is not None and len(read) == len(boxes)
    certainty = float(np.mean([box.confidence for box in read])) if read else 1.0  # where a protocol joins boxes
    return TileAnswer(
        window=shown_window(frame),
        boxes=None if boxes is None else [clip_box(box, frame.photo_px) for box in frame.invert_boxes(boxes)],
        confidences=[box.confidence for box in read] if read and known else [certainty] * len(boxes or ()),
        patch_px=(frame.size_px[0] / side, frame.size_px[1] / side),
        not_found=not_found,
        not_found_prob=answer.not_found_prob,
    )


def shown_window(frame: Frame) -> Window:
    """Return what a frame shows of the photo, without the grey beyond its edges."""
    (x0, y0, x1, y1), (width, height) = frame.window_px, frame.photo_px
    return max(0, x0), max(0, y0), min(width, x1), min(height, y1)


def merged_text(
    prompt: str, text: str, merged: MergedAnswer, size_px: tuple[int, int], not_found: Sequence[str]
) -> str:
    """Return the text of an answer about a tile with the merged boxes, in thousandths of the photo.

    not_found: sentences; where every box was removed and no answer says "not found", the text is the first one in the
    language of the prompt.
    """
    if not merged.boxes:
        if not merged.not_found or text.strip() in not_found:
            return text
        language = detect_language(prompt)
        return next((each for each in not_found if detect_language(each) == language), not_found[0])
    boxes = format_boxes(merged.boxes, size_px)
    first, *others = _BOXES.split(text)
    return first + boxes + "".join(others) if others else boxes


def _merged_prediction(
    question: Question, number: int, given: Given, merged: MergedAnswer, reading: Reading
) -> Prediction:
    """Score merged boxes in pixels of the photo: thousandths of a large photo are too coarse for a small target."""
    best, size_px, wording, protocol = given[merged.best][1], question.frame.photo_px, reading.wording, reading.protocol
    prompt, not_found = question.turns[number].prompt, wording.not_found_sentences
    text = merged_text(prompt, best.readable().text, merged, size_px, not_found)
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
        removed_boxes_xyxy=[box for box, _ in merged.removed] or None,
        removed_confidences=[round(confidence, 4) for _, confidence in merged.removed] or None,
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
