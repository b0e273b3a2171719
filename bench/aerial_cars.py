"""Compare ways to see small targets on real aerial photos, some of which were not trained on: a tiny model.

    python bench/aerial_cars.py PHOTOS --base base/ [--steps 600] [--seeds 1]

PHOTOS: a folder of photos with YOLO labels (`car`, `bus`, ...) beside them. Every second photo, in the order of names,
is trained on, the others are held out; where photos are frames of a film, both halves show the same places. --base: the
model of bench/small_targets.py --base, which finds boxes in drawn scenes. A copy of it is trained on tiles for --steps
steps, and one for each other way for as much CPU time as that took. Then each is asked for every label of a photo, and
for one that is not in it.

whole       the photo at 64 px
resolution  the photo at 128 px, with an interpolated position table
zoom        the model of `whole`; a second look at 192 px of the photo around each answer
tiles       tiles of 192 px at 64 px; boxes from the confidence on that is best for the photos trained on
            "every box": boxes of any confidence

A patch of the whole photo at 64 px is an eighth of it wide, so all targets are smaller. The tables show the fraction of
labelled boxes that are found at IoU 0.5, by the shorter side in patches of a tile.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from small_scenes import Scene, Shown, build_tokenizer, train, turns_of
from small_targets import at_size
from small_targets_asking import PATCH_PX, Looks, Row, ask_tiles, ask_whole, ask_zoomed, choose_confidence, merged

from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.plan import WHOLE
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.record import Record
from cogvlm_ft.data.stored_photo import whole_image
from cogvlm_ft.data.tiling import contents_of, show_tile
from cogvlm_ft.grounding.overlap import match_best, pairwise_iou
from cogvlm_ft.grounding.targets import Target
from cogvlm_ft.grounding.tile_answers import EVERY_BOX
from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer, load_model
from cogvlm_ft.tile_settings import TilesConfig

REPOSITORY = Path(__file__).resolve().parents[1]
TILES = TilesConfig(side_px=192, overlap=0.3, whole=False, fully_annotated=True, absent=0.4, empty=0.4)
LOOKS = Looks(low_px=64, high_px=128, tiles=TILES, zoom_px=192, whole_tokens=900, part_tokens=200)
PATCH_OF_TILE_PX = PATCH_PX * 192 / 64
GROUPS = {"under 1 patch": (0.0, 1.0), "1 to 2 patches": (1.0, 2.0), "from 2 patches": (2.0, 99.0)}
WAYS = ("whole", "resolution", "zoom", "tiles", "tiles, every box")
HALVES = ("trained on", "held out")


@dataclass
class Found:
    """What was found in one half of the photos. sides: of labelled boxes, in patches of a tile; hits: of the same."""

    sides: list[float] = field(default_factory=list)
    hits: list[bool] = field(default_factory=list)
    num_answered: int = 0
    absent_right: list[bool] = field(default_factory=list)
    num_duplicates: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, scenes: Sequence[Scene], rows: Sequence[Row], seconds: float) -> None:
        """Add the answers about photos, and the CPU seconds of all of them."""
        for scene, row in zip(scenes, rows, strict=True):
            for target, (boxes, *_) in zip(scene.targets, row, strict=True):
                if not target.boxes_xyxy:
                    self.absent_right.append(not boxes)
                    continue
                iou = pairwise_iou(boxes, target.boxes_xyxy)
                answered, true = match_best(iou)
                right = set(true[iou[answered, true] >= 0.5].tolist())
                self.hits += [number in right for number in range(len(target.boxes_xyxy))]
                self.sides += [min(x1 - x0, y1 - y0) / PATCH_OF_TILE_PX for x0, y0, x1, y1 in target.boxes_xyxy]
            self.num_answered += sum(len(boxes) for boxes, *_ in row)
            self.num_duplicates.append(sum(duplicates for _, duplicates, _ in row))
        self.seconds.append(seconds / len(scenes))

    def recall(self, least: float = 0.0, most: float = 99.0) -> float:
        hits = [hit for side, hit in zip(self.sides, self.hits, strict=True) if least <= side < most]
        return float(np.mean(hits)) if hits else float("nan")

    @property
    def f1(self) -> float:
        return 2 * sum(self.hits) / (self.num_answered + len(self.hits))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of photos and YOLO labels")
    parser.add_argument("--base", type=Path, required=True, help="model folder that bench/small_targets.py wrote")
    parser.add_argument("--steps", type=int, default=600, help="steps of the training on tiles")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small do not benefit from more
    halves = dict(zip(HALVES, load_halves(args.photos), strict=True))
    found: dict[tuple[str, str], Found] = defaultdict(Found)
    for seed in range(args.seeds):
        run_seed(seed, args, halves, found)
        print(table(found), flush=True)  # of all seeds so far
    whole, tiles = (found[way, "held out"].recall() for way in ("whole", "tiles"))
    times = f"{tiles / whole:.1f} x" if whole else f"none of the whole image, {tiles:.3f} with tiles"
    print(f"tiles against whole image, recall@0.5 of held-out photos: {times}")


def load_halves(photos: Path) -> tuple[list[tuple[Record, Scene]], list[tuple[Record, Scene]]]:
    """Build shards of the photos and read them; return the photos to train on, and the held-out ones."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(REPOSITORY / "shards" / "build.py"), "--format", "yolo", "--out", folder]
        command += ["--images", str(photos), "--annotations", str(photos), "--val-fraction", "0"]
        subprocess.run(command, check=True, capture_output=True)
        reader = ShardReader(load_index([folder], "train"))
        samples = sorted((reader.read(i) for i in range(len(reader))), key=lambda sample: sample.record.key)
    labels = sorted({target.phrase for sample in samples for target in sample.record.targets})
    rng, known = random.Random("absent"), []
    for sample in samples:
        record = sample.record
        others = [label for label in labels if label not in {target.phrase for target in record.targets}]
        absent = Target(rng.choice(others or ["cyclist"]), "en", ())
        known.append((record, Scene(whole_image(sample.image).convert("RGB"), (*record.targets, absent))))
    return known[::2], known[1::2]


def run_seed(
    seed: int,
    args: argparse.Namespace,
    halves: dict[str, list[tuple[Record, Scene]]],
    found: dict[tuple[str, str], Found],
) -> None:
    """Train and ask in every way; add what was found."""
    tokenizer = build_tokenizer()
    budget_s: float | None = None
    for trained in ("tiles", "resolution", "whole"):
        size_px = LOOKS.high_px if trained == "resolution" else LOOKS.low_px
        model = at_size(load_model(args.base, LOOKS.low_px, torch.float32), size_px)
        draw = draw_tile(halves["trained on"]) if trained == "tiles" else draw_whole(halves["trained on"], size_px)
        taken = train(
            model, tokenizer, draw, seed=seed, batch_size=args.batch_size, num_steps=args.steps, cpu_s=budget_s
        )
        budget_s = taken.cpu_s
        print(f"seed {seed}, {trained}: {taken.steps} steps in {taken.cpu_s:.0f} s", flush=True)
        scenes = {half: [scene for _, scene in halves[half]] for half in HALVES}
        if trained == "tiles":
            ask_in_tiles(model, tokenizer, scenes, found)
            continue
        for way in ("whole", "zoom") if trained == "whole" else ("resolution",):
            ask_about = ask_zoomed if way == "zoom" else ask_whole
            for half in HALVES:
                start = time.process_time()
                rows = ask_about(model, tokenizer, scenes[half], LOOKS)
                found[way, half].add(scenes[half], rows, time.process_time() - start)


def ask_in_tiles(
    model: CogVLMForCausalLM,
    tokenizer: CogVLMTokenizer,
    scenes: dict[str, list[Scene]],
    found: dict[tuple[str, str], Found],
) -> None:
    """Ask about all tiles; the least confidence is that of the photos trained on."""
    kept = EVERY_BOX
    for half in HALVES:
        start = time.process_time()
        given = ask_tiles(model, tokenizer, scenes[half], LOOKS)
        seconds = time.process_time() - start
        if half == "trained on":
            kept = choose_confidence(scenes[half], given, only_best=False)
        for way, rule in (("tiles", kept), ("tiles, every box", EVERY_BOX)):
            found[way, half].add(scenes[half], merged(scenes[half], given, rule), seconds)
    print(f"tiles: boxes count from {kept.min_confidence:.2f} on", flush=True)


def draw_whole(known: Sequence[tuple[Record, Scene]], size_px: int) -> Callable[[random.Random], Shown]:
    """Return what draws a photo, shown whole."""
    shown = [
        (scene.image.resize((size_px, size_px), Image.Resampling.BICUBIC), turns_of(scene.targets, scene.image.size))
        for _, scene in known
    ]
    return lambda rng: rng.choice(shown)


def draw_tile(known: Sequence[tuple[Record, Scene]]) -> Callable[[random.Random], Shown]:
    """Return what draws one tile of a photo, as the plan of an epoch mixes them."""
    contents = [
        (record, scene, n, each) for record, scene in known for n, each in enumerate(contents_of(record, TILES))
    ]
    asked = [(record, scene, n) for record, scene, n, each in contents if each.asked]
    empty = [(record, scene, n) for record, scene, n, each in contents if not each.asked and each.absent]
    return partial(_draw_tile, asked, empty)


def _draw_tile(
    asked: Sequence[tuple[Record, Scene, int]], empty: Sequence[tuple[Record, Scene, int]], rng: random.Random
) -> Shown:
    record, scene, tile = rng.choice(empty if rng.random() < TILES.empty else asked)
    assert tile != WHOLE
    shown, frame = show_tile(record, tile, TILES, seed=0, epoch=rng.randrange(1 << 30))
    assert frame is not None
    moved = [replace(target, boxes_xyxy=frame.apply_boxes(target.boxes_xyxy)) for target in shown.targets]
    return scene.image.crop(frame.window_px), turns_of(moved, frame.size_px)


def table(found: dict[tuple[str, str], Found]) -> str:
    """Return a Markdown table of both halves."""
    heads = ["photos", "way", "recall@0.5", *GROUPS, "F1@0.5", "absent", "duplicates", "s a photo"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for half in HALVES:
        for way in WAYS:
            each = found[way, half]
            values = [each.recall(), *(each.recall(*bounds) for bounds in GROUPS.values()), each.f1]
            numbers = [f"{value:.3f}" for value in (*values, np.mean(each.absent_right))]
            numbers += [f"{np.mean(each.num_duplicates):.1f}", f"{np.mean(each.seconds):.2f}"]
            lines.append(f"| {half} | {way} | {' | '.join(numbers)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
