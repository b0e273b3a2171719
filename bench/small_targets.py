"""Compare ways to see small targets: whole photo, raised resolution, zoom, tiles; equal training cost for all.

    python bench/small_targets.py --base base/ [--base-steps 3000] [--steps 170] [--seeds 3] [--scenes 48] [--shrunk]

Scenes are 512 px wide, their coloured boxes 3 to 16 px. The model sees 64 px in patches of 8 px, so every target is
smaller than one patch of the whole photo. A tiny model first learns to find larger boxes, of 4 to 36 px in scenes of
128 px (--base-steps; the folder --base keeps it for later runs). For each seed each way then trains it on the small
targets, with absent ones too: tiles for --steps steps, the others for as much CPU time as that took.

whole       the photo at 64 px
resolution  the photo at 128 px, with an interpolated position table
zoom        the model of `whole`; a second look at the quarter of the photo around each answer
tiles       16 tiles of 144 px at 64 px, by the plan, the clipping and the merging of `data.tiles`; boxes from a least
            confidence on, which other scenes choose, and the most confident one only: a colour is one object
            "confident": all from such a confidence on; "every box": all
cost only   the model of `resolution`, untrained at 232 px, which sees as much as tiles do

--shrunk: scenes of 128 px with boxes of 3 to 40 px in three colours; input of 32 px, tiles of 32 px and the whole
photo. There the whole photo shows targets of less and of more than one patch, and a tile not always the larger ones.

Training takes 18 to 30 minutes of CPU time for the model of larger boxes, and 3 to 6 for each seed.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from small_scenes import MAX_NEW_TOKENS, Scene, Shown, build_model, build_tokenizer, make_scene, train, turns_of
from small_targets_asking import (
    PATCH_PX,
    Results,
    Setting,
    accuracy_with,
    add,
    ask_tiles,
    ask_whole,
    ask_zoomed,
    choose_confidence,
    diagnosis,
    merged,
    with_absent,
)

from cogvlm_ft.data.plan import WHOLE
from cogvlm_ft.data.record import Record
from cogvlm_ft.data.tiling import contents_of, photo_tiles, show_tile
from cogvlm_ft.grounding.confidence import KeptBoxes
from cogvlm_ft.grounding.tile_answers import EVERY_BOX
from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer, load_model
from cogvlm_ft.tile_settings import TilesConfig

NUM_LARGE = 3
COST_ONLY = "cost only"
TILES = ("tiles", "tiles, confident", "tiles, every box")
WAYS = ("whole", "resolution", "zoom", *TILES)

_TILES = TilesConfig(side_px=144, overlap=0.14, whole=False, fully_annotated=True, absent=0.4, empty=0.4)
FULL = Setting(
    low_px=64,
    high_px=128,
    tiles=_TILES,
    zoom_px=128,
    whole_tokens=MAX_NEW_TOKENS,
    part_tokens=MAX_NEW_TOKENS,
    photo_px=512,
    dense_px=232,
    sizes_px=(3.0, 16.0),
    large_px=(128, 4.0, 12.0),
    groups_px=((3, 6), (7, 11), (12, 16)),
    num_colours=6,
)
SHRUNK = replace(
    FULL,
    low_px=32,
    high_px=64,
    tiles=replace(_TILES, side_px=32, overlap=0.5, whole=True),
    zoom_px=32,
    photo_px=128,
    dense_px=128,
    sizes_px=(3.0, 40.0),
    large_px=(32, 4.0, 7.0),
    groups_px=((3, 6), (7, 11), (12, 16), (17, 31), (32, 40)),
    num_colours=3,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shrunk", action="store_true", help="smaller photos, which a tiny model learns in minutes")
    parser.add_argument("--base", type=Path, help="model folder of the training on larger boxes; written if missing")
    parser.add_argument("--base-steps", type=int, default=3000, help="steps of the training on larger boxes")
    parser.add_argument("--steps", type=int, default=170, help="steps of the training on tiles")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scenes", type=int, default=48, help="that are asked about after training")
    args = parser.parse_args()
    setting = SHRUNK if args.shrunk else FULL
    torch.set_num_threads(1)  # matrices this small do not benefit from more
    tokenizer = build_tokenizer()
    base = load_base(args, tokenizer, setting)
    found: dict[str, Results] = defaultdict(Results)
    for seed in range(args.seeds):
        run_seed(seed, args, setting, base, tokenizer, found)
        print(table(found, setting), flush=True)  # of all seeds so far
    print(verdict(found, setting))


def load_base(args: argparse.Namespace, tokenizer: CogVLMTokenizer, setting: Setting) -> CogVLMForCausalLM:
    """Load the model that finds larger boxes, or train it."""
    if args.base and args.base.is_dir():
        return load_model(args.base, setting.low_px, torch.float32)
    base = build_model(tokenizer, setting.low_px, seed=0)
    train(base, tokenizer, draw_large(setting), seed=0, batch_size=args.batch_size, num_steps=args.base_steps)
    if args.base:
        base.save_pretrained(args.base)
    return base


def run_seed(
    seed: int,
    args: argparse.Namespace,
    setting: Setting,
    base: CogVLMForCausalLM,
    tokenizer: CogVLMTokenizer,
    found: dict[str, Results],
) -> None:
    """Train and ask in every way; add what was found."""
    rng = random.Random("held out")
    scenes = [setting.draw_scene(rng) for _ in range(args.scenes)]
    budget_s: float | None = None
    for trained in ("tiles", "whole", "resolution"):
        model = at_size(base, setting.high_px if trained == "resolution" else setting.low_px)
        draw = (draw_tile if trained == "tiles" else draw_whole)(setting)
        taken = train(
            model, tokenizer, draw, seed=seed, batch_size=args.batch_size, num_steps=args.steps, cpu_s=budget_s
        )
        budget_s = taken.cpu_s
        print(f"seed {seed}, {trained}: {taken.steps} steps in {taken.cpu_s:.0f} s", flush=True)
        if trained == "tiles":
            ask_in_tiles(model, tokenizer, scenes, setting, found)
            continue
        for way in ("whole", "zoom") if trained == "whole" else ("resolution",):
            start = time.process_time()
            answered = (ask_zoomed if way == "zoom" else ask_whole)(model, tokenizer, scenes, setting)
            add(found[way], scenes, answered, time.process_time() - start)
    measure_cost(model, tokenizer, scenes, setting, found[COST_ONLY])
    for way in WAYS:
        accuracy = np.mean([score.iou >= 0.5 for side, score in found[way].scores[-3 * len(scenes) :] if side])
        print(f"seed {seed}, {way}: acc@0.5 {accuracy:.3f}, {found[way].seconds[-1]:.2f} s a photo", flush=True)


def ask_in_tiles(
    model: CogVLMForCausalLM,
    tokenizer: CogVLMTokenizer,
    scenes: Sequence[Scene],
    setting: Setting,
    found: dict[str, Results],
) -> None:
    """Ask about all tiles, choose the least confidence on other scenes, and describe what was answered."""
    start = time.process_time()
    given = ask_tiles(model, tokenizer, scenes, setting)
    seconds = time.process_time() - start
    rng = random.Random("validation")
    others = [setting.draw_scene(rng) for _ in range(len(scenes) // 2)]
    of_others = ask_tiles(model, tokenizer, others, setting)
    for way, only_best in (("tiles", True), ("tiles, confident", False)):
        kept = choose_confidence(others, of_others, only_best)
        rules = [KeptBoxes(n / 50, only_best) for n in range(50)]
        best, at = max((accuracy_with(scenes, given, rule), rule.min_confidence) for rule in rules)
        best_for_these = f"the best for these scenes is {at:.2f}: acc@0.5 {best:.3f}"
        print(f"{way}: from {kept.min_confidence:.2f} on; {best_for_these}", flush=True)
        add(found[way], scenes, merged(scenes, given, kept), seconds)
    add(found["tiles, every box"], scenes, merged(scenes, given, EVERY_BOX), seconds)
    print(f"tiles: {diagnosis(scenes, given)}", flush=True)


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
    side_px, least, most = setting.large_px

    def draw(rng: random.Random) -> Shown:
        smallest = least * (most / least) ** rng.random()
        num_targets = min(NUM_LARGE, setting.num_colours - 1)
        scene = make_scene(rng, side_px, (smallest, 3 * smallest), num_targets, setting.num_colours)
        scene = with_absent(rng, scene, setting.num_colours)
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


def measure_cost(
    model: CogVLMForCausalLM,
    tokenizer: CogVLMTokenizer,
    scenes: Sequence[Scene],
    setting: Setting,
    results: Results,
) -> None:
    """Measure the seconds per photo at the resolution that sees as much as tiles do."""
    model = at_size(model, setting.dense_px)
    start = time.process_time()
    add(results, scenes, ask_whole(model, tokenizer, scenes, setting), time.process_time() - start)


def table(found: dict[str, Results], setting: Setting) -> str:
    """Return a Markdown table: acc@0.5 by the shorter side of the target, F1, boxes and CPU seconds per photo."""
    heads = " | ".join(f"{low} to {high} px" for low, high in setting.groups_px)
    lines = [
        f"| way | acc@0.5 | {heads} | F1@0.5 | absent found absent | duplicates | removed | tokens | s a photo |",
        "|---" * (len(setting.groups_px) + 8) + "|",
    ]
    for way in (*WAYS, COST_ONLY):
        each = found[way]
        groups = " | ".join(f"{each.accuracy(*bounds):.3f}" for bounds in setting.groups_px)
        scores = [score for _, score in each.scores]
        f1 = 2 * sum(s.num_hits for s in scores) / sum(s.num_answered + s.num_true for s in scores)
        absent = np.mean([score.num_answered == 0 for side, score in each.scores if not side])
        values = f"{each.accuracy(0, setting.photo_px):.3f} | {groups} | {f1:.3f} | {absent:.3f}"
        values = " | ".join(["-"] * (len(setting.groups_px) + 3)) if way == COST_ONLY else values
        counts = " | ".join(f"{np.mean(numbers):.1f}" for numbers in (each.num_duplicates, each.num_removed))
        lines.append(f"| {way} | {values} | {counts} | {num_tokens(way, setting)} | {np.mean(each.seconds):.2f} |")
    return "\n".join(lines)


def num_tokens(way: str, setting: Setting) -> int:
    """Return the image tokens of the first look at a photo."""
    size_px = {"resolution": setting.high_px, COST_ONLY: setting.dense_px}.get(way, setting.low_px)
    num_tiles = len(photo_tiles((setting.photo_px, setting.photo_px), setting.tiles)) + setting.tiles.whole
    return (size_px // PATCH_PX) ** 2 * (num_tiles if way in TILES else 1)


def verdict(found: dict[str, Results], setting: Setting) -> str:
    """Return the last line, about targets under one patch of the whole photo."""
    whole, tiles = (found[way].accuracy(0, setting.patch_px - 1e-9) for way in ("whole", "tiles"))
    times = f"{tiles / whole:.1f} x" if whole else f"none of the whole image, {tiles:.3f} with tiles"
    return f"tiles against whole image, acc@0.5 under one patch: {times}"


if __name__ == "__main__":
    main()
