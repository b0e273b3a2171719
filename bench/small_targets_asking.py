"""Questions about small targets, asked in every way of bench/small_targets.py, and the scores of the answers."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image
from small_scenes import COLOURS, Scene, ask, make_scene

from cogvlm_ft.data.tiling import photo_tiles
from cogvlm_ft.evaluate.generate import Answer
from cogvlm_ft.grounding.average_precision import rank_boxes
from cogvlm_ft.grounding.boxes import boxes_from_bins, parse_boxes, read_boxes
from cogvlm_ft.grounding.confidence import KeptBoxes, confidence_curve
from cogvlm_ft.grounding.metrics import AnswerScore, score_boxes
from cogvlm_ft.grounding.targets import Box, Target
from cogvlm_ft.grounding.tile_answers import EVERY_BOX, TileAnswer, merge_answers
from cogvlm_ft.grounding.tiles import Window, visible_fractions
from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer
from cogvlm_ft.tile_settings import TilesConfig

PATCH_PX, NUM_TARGETS = 8, 2


@dataclass(frozen=True)
class Looks:
    """How photos are shown: input sizes in pixels, tiles, the side of a second look in pixels of the photo.

    whole_tokens, part_tokens: most new tokens of an answer about the whole photo, or about a part of it.
    """

    low_px: int
    high_px: int
    tiles: TilesConfig
    zoom_px: int
    whole_tokens: int
    part_tokens: int


@dataclass(frozen=True)
class Setting(Looks):
    """Sizes in pixels: of the photo, of the input that sees as much as tiles, of targets.

    large_px: (side of scenes, least and most size of the smallest box, the largest is 3 times as wide) before.
    """

    photo_px: int
    dense_px: int
    sizes_px: tuple[float, float]
    large_px: tuple[int, float, float]
    groups_px: tuple[tuple[int, int], ...]
    num_colours: int

    @property
    def patch_px(self) -> float:
        """Return the side of a patch in pixels of the whole photo."""
        return PATCH_PX * self.photo_px / self.low_px

    def draw_scene(self, rng: random.Random) -> Scene:
        scene = make_scene(rng, self.photo_px, self.sizes_px, NUM_TARGETS, self.num_colours)
        return with_absent(rng, scene, self.num_colours)


def with_absent(rng: random.Random, scene: Scene, num_colours: int) -> Scene:
    """Add a target of another colour, without a box."""
    others = sorted(set(sorted(COLOURS)[:num_colours]) - {target.phrase for target in scene.targets})
    return replace(scene, targets=(*scene.targets, Target(rng.choice(others), "en", ())))


@dataclass
class Results:
    """scores: (side of the target or 0 if it is absent, score). The lists hold one value for each seed."""

    scores: list[tuple[float, AnswerScore]] = field(default_factory=list)
    num_duplicates: list[float] = field(default_factory=list)
    num_removed: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def accuracy(self, least_px: float, most_px: float) -> float:
        """Return the acc@0.5 of targets whose shorter side is in these bounds."""
        hits = [score.iou >= 0.5 for side, score in self.scores if side and least_px <= side <= most_px]
        return float(np.mean(hits)) if hits else float("nan")


def add(results: Results, scenes: Sequence[Scene], answered: Sequence[Row], seconds: float) -> None:
    """Add the scores of all scenes that one model was asked about."""
    for scene, row in zip(scenes, answered, strict=True):
        for target, (boxes, *_) in zip(scene.targets, row, strict=True):
            x0, y0, x1, y1 = target.boxes_xyxy[0] if target.boxes_xyxy else (0.0, 0.0, 0.0, 0.0)
            results.scores.append((min(x1 - x0, y1 - y0), score_boxes(boxes, not boxes, target.boxes_xyxy)))
    results.num_duplicates.append(sum(each[1] for row in answered for each in row) / len(scenes))
    results.num_removed.append(sum(each[2] for row in answered for each in row) / len(scenes))
    results.seconds.append(seconds / len(scenes))


Row = list[tuple[list[Box], int, int]]
"""For each question the boxes in pixels of the photo, and how many duplicates and weak boxes were removed."""


def ask_whole(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, scenes: Sequence[Scene], looks: Looks) -> list[Row]:
    phrases = [[target.phrase for target in scene.targets] for scene in scenes]
    answers = ask(model, tokenizer, [scene.image for scene in scenes], phrases, looks.whole_tokens)
    return [
        [(boxes_in(answer, (0, 0, *scene.image.size)), 0, 0) for answer in row]
        for scene, row in zip(scenes, answers, strict=True)
    ]


def ask_zoomed(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, scenes: Sequence[Scene], looks: Looks
) -> list[Row]:
    """Ask about the whole photo, then about the part around each box, which the nearest box found there replaces."""
    found = ask_whole(model, tokenizer, scenes, looks)
    places = [(s, t, k) for s, row in enumerate(found) for t, (boxes, *_) in enumerate(row) for k in range(len(boxes))]
    windows = [window_around(found[s][t][0][k], looks.zoom_px, scenes[s].image.size) for s, t, k in places]
    images: list[Image.Image] = [scenes[s].image.crop(at) for (s, *_), at in zip(places, windows, strict=True)]
    phrases = [[scenes[s].targets[t].phrase] for s, t, _ in places]
    answers = ask(model, tokenizer, images, phrases, looks.part_tokens)
    for (s, t, k), window, [answer] in zip(places, windows, answers, strict=True):
        first = found[s][t][0][k]
        found[s][t][0][k] = min(boxes_in(answer, window), key=lambda box: distance(box, first), default=first)
    return found


def distance(box: Box, other: Box) -> float:
    """Return the distance of the centres."""
    return float(np.hypot(*(np.add(box[:2], box[2:]) - np.add(other[:2], other[2:]))) / 2)


def window_around(box: Box, side_px: int, size_px: tuple[int, int]) -> Window:
    x0, y0 = (int(min(max(0, (box[i] + box[i + 2]) / 2 - side_px / 2), size_px[i] - side_px)) for i in (0, 1))
    return x0, y0, x0 + side_px, y0 + side_px


def ask_tiles(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, scenes: Sequence[Scene], looks: Looks
) -> list[list[list[TileAnswer]]]:
    """Return the answers about all tiles, for each scene and target."""
    windows = [photo_tiles(scene.image.size, looks.tiles) for scene in scenes]
    if looks.tiles.whole:
        windows = [[*tiles, (0, 0, *scene.image.size)] for scene, tiles in zip(scenes, windows, strict=True)]
    shown = [(scene, window) for scene, tiles in zip(scenes, windows, strict=True) for window in tiles]
    images: list[Image.Image] = [scene.image.crop(window) for scene, window in shown]
    phrases = [[target.phrase for target in scene.targets] for scene, _ in shown]
    answers = iter(ask(model, tokenizer, images, phrases, looks.part_tokens))
    parts = [[[tile_answer(each, window, looks) for each in next(answers)] for window in tiles] for tiles in windows]
    return [[list(column) for column in zip(*rows, strict=True)] for rows in parts]


def tile_answer(answer: Answer, window: Window, looks: Looks) -> TileAnswer:
    boxes, read = boxes_in(answer, window), read_boxes(answer.text, answer.digit_probs)
    confidences = [each.confidence for each in read] if read and len(read) == len(boxes) else [1.0] * len(boxes)
    patch_px = [PATCH_PX * (window[i + 2] - window[i]) / looks.low_px for i in (0, 1)]
    return TileAnswer(window, boxes, confidences, (patch_px[0], patch_px[1]), not boxes, answer.not_found_prob)


def boxes_in(answer: Answer, window: Window) -> list[Box]:
    x0, y0, x1, y1 = window
    boxes = boxes_from_bins(parse_boxes(answer.text) or [], (x1 - x0, y1 - y0)).tolist()
    return [(a + x0, b + y0, c + x0, d + y0) for a, b, c, d in boxes]


def merged(scenes: Sequence[Scene], given: Sequence[Sequence[Sequence[TileAnswer]]], kept: KeptBoxes) -> list[Row]:
    """Merge the answers about tiles."""
    rows = [
        [merge_answers(answers, scene.image.size, kept) for answers in row]
        for scene, row in zip(scenes, given, strict=True)
    ]
    return [[(each.boxes or [], each.num_duplicates, each.num_removed) for each in row] for row in rows]


def choose_confidence(
    scenes: Sequence[Scene], given: Sequence[Sequence[Sequence[TileAnswer]]], only_best: bool
) -> KeptBoxes:
    """Choose which boxes count where F1 is highest, as an evaluation during training does."""
    ranked = []
    for scene, row in zip(scenes, given, strict=True):
        for target, answers in zip(scene.targets, row, strict=True):
            answer = merge_answers(answers, scene.image.size)
            ranked.append(rank_boxes(answer.boxes or [], answer.confidences, target.boxes_xyxy))
    curve = confidence_curve(ranked, only_best=only_best)
    return curve.kept if curve else EVERY_BOX


def accuracy_with(scenes: Sequence[Scene], given: Sequence[Sequence[Sequence[TileAnswer]]], kept: KeptBoxes) -> float:
    results = Results()
    add(results, scenes, merged(scenes, given, kept), 0.0)
    return results.accuracy(0, math.inf)


def diagnosis(scenes: Sequence[Scene], given: Sequence[Sequence[Sequence[TileAnswer]]]) -> str:
    """Say how often tiles with and without a target are answered rightly, and what merging is given."""
    hits, near, says_so, num_wrong, seen = list[bool](), list[bool](), list[bool](), list[int](), list[bool]()
    for scene, row in zip(scenes, given, strict=True):
        for target, answers in zip(scene.targets, row, strict=True):
            truth = target.boxes_xyxy
            shown = visible_fractions(truth, [each.window for each in answers]).max(axis=1, initial=0.0)
            scores = [score_boxes(each.boxes, False, truth) for each in answers]
            complete = [score for score, fraction in zip(scores, shown, strict=True) if fraction == 1]
            hits += [score.num_hits > 0 for score in complete]
            near += [score.centre > 0 for score in complete]
            without = [each for each, fraction in zip(answers, shown, strict=True) if fraction == 0]
            says_so += [each.not_found for each in without]
            num_wrong.append(sum(len(each.boxes or ()) for each in without))
            seen += [any(score.num_hits for score in complete)] if truth else []
    return (
        f"of tiles that show a target whole {np.mean(hits):.3f} are right at IoU 0.5, {np.mean(near):.3f} by the "
        f'centre; {np.mean(says_so):.3f} of those without it answer "not found"; {np.mean(num_wrong):.2f} boxes a '
        f"question are from these; {np.mean(seen):.3f} of targets are right in some tile"
    )
