"""Compare ways to see small targets: whole photo, raised resolution, zoom, tiles; equal training cost for all.

    python bench/small_targets.py [--shrunk] [--base-s 60] [--cpu-s 20] [--seeds 3] [--scenes 24]

Scenes are 512 px wide, their coloured boxes 3 to 16 px. The model sees 64 px in patches of 8 px, so every target is
smaller than one patch of the whole photo. For each seed a tiny model first learns to find larger boxes in small scenes
(--base-s seconds of CPU time), then each way trains it on the small targets for the same CPU time (--cpu-s):

whole       the photo at 64 px
resolution  the photo at 128 px, with an interpolated position table
zoom        the model of `whole`; a second look at the quarter of the photo around each answer
tiles       tiles of 128 px at 64 px, by the plan, the clipping and the merging of `data.tiles`

--shrunk: scenes of 128 px with boxes of 3 to 40 px in three colours; input of 32 px, tiles of 32 px and the whole
photo. There the whole photo shows targets of less and of more than one patch, and a tile not always the larger ones.

Training takes (base-s + 3 x cpu-s) x seeds seconds of CPU time. In full size with --base-s 70 --cpu-s 25 no way finds
any target yet: a comparison needs far more.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from small_scenes import Scene, Shown, ask, build_model, build_tokenizer, make_scene, train, turns_of

from cogvlm_ft.data.plan import WHOLE
from cogvlm_ft.data.record import Record
from cogvlm_ft.data.tiling import contents_of, photo_tiles, show_tile
from cogvlm_ft.evaluate.generate import Answer
from cogvlm_ft.grounding.boxes import boxes_from_bins, parse_boxes, read_boxes
from cogvlm_ft.grounding.metrics import score_boxes
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.grounding.tile_answers import TileAnswer, merge_answers
from cogvlm_ft.grounding.tiles import Window
from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer, load_model
from cogvlm_ft.tile_settings import TilesConfig

PATCH_PX, NUM_TARGETS = 8, 2
WAYS = ("whole", "resolution", "zoom", "tiles")


@dataclass(frozen=True)
class Setting:
    """Sizes in pixels: of the photo, the low and the high input; of targets, of boxes in the small scenes before."""

    photo_px: int
    low_px: int
    high_px: int
    tiles: TilesConfig
    sizes_px: tuple[float, float]
    large_px: tuple[float, float]
    groups_px: tuple[tuple[int, int], ...]
    num_colours: int

    @property
    def patch_px(self) -> float:
        """Return the side of a patch in pixels of the whole photo."""
        return PATCH_PX * self.photo_px / self.low_px

    @property
    def zoom_px(self) -> int:
        return self.photo_px // 4

    def draw_scene(self, rng: random.Random) -> Scene:
        return make_scene(rng, self.photo_px, self.sizes_px, NUM_TARGETS, self.num_colours)


_TILES = TilesConfig(side_px=128, overlap=0.2, whole=False, fully_annotated=True, absent=0.4)
FULL = Setting(512, 64, 128, _TILES, (3.0, 16.0), (6.0, 28.0), ((3, 6), (7, 11), (12, 16)), 6)
SHRUNK = Setting(
    128,
    32,
    64,
    replace(_TILES, side_px=32, overlap=0.5, empty=0.4, whole=True),
    (3.0, 40.0),
    (4.0, 20.0),
    ((3, 6), (7, 11), (12, 16), (17, 31), (32, 40)),
    3,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shrunk", action="store_true", help="smaller photos, which a tiny model learns in minutes")
    parser.add_argument("--base-s", type=float, default=60.0, help="CPU time of the training on larger boxes")
    parser.add_argument("--cpu-s", type=float, default=20.0, help="CPU time of the training of each way")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scenes", type=int, default=24, help="that are asked about after training")
    args = parser.parse_args()
    setting = SHRUNK if args.shrunk else FULL
    torch.set_num_threads(1)  # matrices this small do not benefit from more
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    facts: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for seed in range(args.seeds):
        for way, ious, num_duplicates, seconds in run_seed(seed, args, setting):
            found[way] += ious
            facts[way].append((num_duplicates, seconds))
            accuracy = np.mean([iou >= 0.5 for _, iou in ious])
            print(f"seed {seed}, {way}: acc@0.5 {accuracy:.3f}, {seconds:.2f} s a photo", flush=True)
    print(table(found, facts, setting))
    print(verdict(found, setting))


def run_seed(
    seed: int, args: argparse.Namespace, setting: Setting
) -> list[tuple[str, list[tuple[float, float]], float, float]]:
    """Train and ask in every way; return (way, (side, IoU) of each target, duplicates and CPU seconds per photo)."""
    tokenizer = build_tokenizer()
    base = build_model(tokenizer, setting.low_px, seed)
    steps = train(base, tokenizer, draw_large(setting), seed=seed, batch_size=args.batch_size, cpu_s=args.base_s)
    print(f"seed {seed}, larger boxes: {steps} steps", flush=True)
    models: dict[str, CogVLMForCausalLM] = {}
    for way, draw in (("whole", draw_whole), ("resolution", draw_whole), ("tiles", draw_tile)):
        models[way] = at_size(base, setting.high_px if way == "resolution" else setting.low_px)
        steps = train(
            models[way], tokenizer, draw(setting), seed=seed + 100, batch_size=args.batch_size, cpu_s=args.cpu_s
        )
        print(f"seed {seed}, {way}: {steps} steps", flush=True)
    models["zoom"] = models["whole"]
    rng = random.Random("held out")
    scenes = [setting.draw_scene(rng) for _ in range(args.scenes)]
    results = []
    for way in WAYS:
        start = time.process_time()
        answered = {"zoom": ask_zoomed, "tiles": ask_tiles}.get(way, ask_whole)(models[way], tokenizer, scenes, setting)
        seconds = (time.process_time() - start) / len(scenes)
        ious, num_duplicates = [], 0
        for scene, row in zip(scenes, answered, strict=True):
            for target, (boxes, removed) in zip(scene.targets, row, strict=True):
                x0, y0, x1, y1 = target.boxes_xyxy[0]
                side = min(x1 - x0, y1 - y0)
                ious.append((side, score_boxes(boxes, False, target.boxes_xyxy).iou))
                num_duplicates += removed
        results.append((way, ious, num_duplicates / len(scenes), seconds))
    return results


def at_size(model: CogVLMForCausalLM, size_px: int) -> CogVLMForCausalLM:
    """Return a copy of the model for another resolution, its position table interpolated as when weights are loaded."""
    if size_px == model.config.image_size:
        return copy.deepcopy(model)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_model(folder, size_px, torch.float32)


Draw = Callable[[random.Random], Shown]


def draw_large(setting: Setting) -> Draw:
    """Return what draws a small scene with larger boxes."""

    def draw(rng: random.Random) -> Shown:
        scene = make_scene(rng, setting.low_px, setting.large_px, NUM_TARGETS, setting.num_colours)
        return scene.image, turns_of(scene.targets, scene.image.size)

    return draw


def draw_whole(setting: Setting) -> Draw:
    """Return what draws a scene with small targets, shown whole."""

    def draw(rng: random.Random) -> Shown:
        scene = setting.draw_scene(rng)
        return scene.image, turns_of(scene.targets, scene.image.size)

    return draw


def draw_tile(setting: Setting) -> Draw:
    """Return what draws one tile of such a scene or the scene itself, as the plan of an epoch mixes them."""

    def draw(rng: random.Random) -> Shown:
        scene, tiles = setting.draw_scene(rng), setting.tiles
        record = Record(str(rng.random()), scene.image.size, "", scene.targets, ())
        contents = contents_of(record, tiles)
        is_empty = rng.random() < tiles.empty
        choices = [n for n, each in enumerate(contents) if bool(each.asked) != is_empty and (each.asked or each.absent)]
        tile = rng.choice([*choices, *([WHOLE] if (tiles.whole and not is_empty) or not choices else [])])
        shown, frame = show_tile(record, tile, tiles, seed=0, epoch=0)
        if frame is None:
            return scene.image, turns_of(scene.targets, scene.image.size)
        moved = [replace(target, boxes_xyxy=frame.apply_boxes(target.boxes_xyxy)) for target in shown.targets]
        return scene.image.crop(frame.window_px), turns_of(moved, frame.size_px)

    return draw


Row = list[tuple[list[Box], int]]
"""For each question the boxes in pixels of the photo, and how many duplicates were removed."""


def ask_whole(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, scenes: Sequence[Scene], setting: Setting
) -> list[Row]:
    answers = ask(model, tokenizer, [s.image for s in scenes], [[t.phrase for t in s.targets] for s in scenes])
    return [[(boxes_in(answer, (0, 0, setting.photo_px, setting.photo_px)), 0) for answer in row] for row in answers]


def ask_zoomed(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, scenes: Sequence[Scene], setting: Setting
) -> list[Row]:
    """Ask about the whole photo, then about the part around the first box, whose answer replaces it."""
    found = []
    for scene, row in zip(scenes, ask_whole(model, tokenizer, scenes, setting), strict=True):
        zoomed: Row = []
        for target, (boxes, _) in zip(scene.targets, row, strict=True):
            if boxes:
                window = window_around(boxes[0], setting)
                [[second]] = ask(model, tokenizer, [scene.image.crop(window)], [[target.phrase]])
                boxes = boxes_in(second, window) or boxes
            zoomed.append((boxes, 0))
        found.append(zoomed)
    return found


def window_around(box: Box, setting: Setting) -> Window:
    side, most = setting.zoom_px, setting.photo_px - setting.zoom_px
    x0, y0 = (int(min(max(0, (box[i] + box[i + 2]) / 2 - side / 2), most)) for i in (0, 1))
    return x0, y0, x0 + side, y0 + side


def ask_tiles(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, scenes: Sequence[Scene], setting: Setting
) -> list[Row]:
    size_px = setting.photo_px, setting.photo_px
    windows = photo_tiles(size_px, setting.tiles)
    windows += [(0, 0, *size_px)] if setting.tiles.whole else []
    images: list[Image.Image] = [scene.image.crop(window) for scene in scenes for window in windows]
    phrases = [[t.phrase for t in scene.targets] for scene in scenes for _ in windows]
    answers = ask(model, tokenizer, images, phrases)
    found = []
    for n, scene in enumerate(scenes):
        rows = answers[n * len(windows) : (n + 1) * len(windows)]
        row: Row = []
        for i in range(len(scene.targets)):
            given = [tile_answer(part[i], window, setting) for part, window in zip(rows, windows, strict=True)]
            merged = merge_answers(given, size_px)
            row.append((merged.boxes or [], merged.num_duplicates))
        found.append(row)
    return found


def tile_answer(answer: Answer, window: Window, setting: Setting) -> TileAnswer:
    boxes, read = boxes_in(answer, window), read_boxes(answer.text, answer.digit_probs)
    confidences = [each.confidence for each in read] if read and len(read) == len(boxes) else [1.0] * len(boxes)
    patch_px = PATCH_PX * (window[2] - window[0]) / setting.low_px
    return TileAnswer(window, boxes, confidences, (patch_px, patch_px), not boxes, answer.not_found_prob)


def boxes_in(answer: Answer, window: Window) -> list[Box]:
    x0, y0, x1, y1 = window
    boxes = boxes_from_bins(parse_boxes(answer.text) or [], (x1 - x0, y1 - y0)).tolist()
    return [(a + x0, b + y0, c + x0, d + y0) for a, b, c, d in boxes]


def table(found: dict[str, list[Any]], facts: dict[str, list[tuple[float, float]]], setting: Setting) -> str:
    """Return a Markdown table: acc@0.5 by the shorter side of the target, duplicates and CPU seconds per photo."""
    heads = " | ".join(f"{low} to {high} px" for low, high in setting.groups_px)
    lines = [
        f"| way | acc@0.5 | {heads} | duplicates a photo | s a photo |",
        "|---" * (len(setting.groups_px) + 4) + "|",
    ]
    for way in WAYS:
        sides, hits = np.array([each[0] for each in found[way]]), np.array([each[1] >= 0.5 for each in found[way]])
        groups = [hits[(sides >= low) & (sides <= high)] for low, high in setting.groups_px]
        shares = " | ".join(f"{group.mean():.3f}" if len(group) else "" for group in groups)
        duplicates, seconds = np.mean(facts[way], axis=0)
        lines.append(f"| {way} | {hits.mean():.3f} | {shares} | {duplicates:.1f} | {seconds:.2f} |")
    return "\n".join(lines)


def verdict(found: dict[str, list[Any]], setting: Setting) -> str:
    """Return the last line, about targets under one patch of the whole photo."""
    whole, tiles = (
        float(np.mean([iou >= 0.5 for side, iou in found[way] if side < setting.patch_px]))
        for way in ("whole", "tiles")
    )
    times = f"{tiles / whole:.1f} x" if whole else f"none of the whole image, {tiles:.3f} with tiles"
    return f"tiles against whole image, acc@0.5 under one patch: {times}"


if __name__ == "__main__":
    main()
