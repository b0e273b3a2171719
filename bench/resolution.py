"""Compare continued training at a low and at a higher resolution, at equal steps, by the size of targets.

    python bench/resolution.py --base base/ --low 64 --high 128 [--steps 120] [--seeds 1]
    python bench/resolution.py [--low 32] [--high 64] [--before 1600] [--steps 400] [--seeds 1] [--smooth]

Scenes are 128 px wide, their coloured boxes 3 to 40 px. A tiny model with patches of 8 px first trains at the low
resolution (--before), or is the one that bench/small_targets.py --base trained at 64 px. Then copies of it continue for
as many steps as each other (--steps), on the same scenes:

low           at the low resolution
high          at the higher one, with the position table interpolated as when weights are loaded
high, random  at the higher one, with a new random position table

--smooth: the random model starts with a position table in which neighbours are alike; without it they are unrelated
("similarity", the mean cosine), so the entries interpolated between them are like nothing that the layers have seen.

Accuracies at IoU 0.5 are those before and after the continued training, of targets under and from one patch of the
low resolution on the shorter side. "off" is the median distance of answered and true centres, in thousandths of the
image, along a side; "width" the median of answered / true width. Before the training at the higher resolution they are
measured in scenes twice as wide too, where targets have as many pixels of the input as at the low one.
"""

from __future__ import annotations

import argparse
import math
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from small_scenes import Shown, ask, build_model, build_tokenizer, make_scene, train, turns_of
from small_targets import at_size
from torch import Tensor

from cogvlm_ft.grounding.boxes import boxes_from_bins, parse_boxes
from cogvlm_ft.grounding.metrics import score_boxes
from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer, load_model

PHOTO_PX, PATCH_PX, SIZES_PX, NUM_TARGETS = 128, 8, (3.0, 40.0), 2
WAYS = ("low", "high", "high, random")
HEADS = ("all", "under one patch", "from one patch", "off", "width")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="model folder to start from (default: a random model)")
    parser.add_argument("--low", type=int, default=32, help="px, a multiple of 8")
    parser.add_argument("--high", type=int, default=64, help="px, a multiple of 8")
    parser.add_argument("--before", type=int, default=1600, help="steps at the low resolution before all runs")
    parser.add_argument("--smooth", action="store_true", help="start with a smooth position table")
    parser.add_argument("--steps", type=int, default=400, help="steps of each run")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--scenes", type=int, default=96, help="that are asked about")
    args = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small do not benefit from more
    found: dict[str, list[list[float]]] = defaultdict(list)
    for seed in range(args.seeds):
        run_seed(seed, args, found)
    print("| way | " + " | ".join(f"{head}, {when}" for when in ("before", "after") for head in HEADS) + " |")
    print("|---" * (1 + 2 * len(HEADS)) + "|")
    for way in args.ways:
        print(f"| {way} | " + " | ".join(f"{value:.3f}" for value in np.mean(found[way], axis=0)) + " |")
    gain = np.mean(
        [high[len(HEADS) + 1] - low[len(HEADS) + 1] for low, high in zip(found["low"], found["high"], strict=True)]
    )
    print(f"higher resolution, acc@0.5 under one patch: {gain:+.3f}")


def run_seed(seed: int, args: argparse.Namespace, found: dict[str, list[list[float]]]) -> None:
    """Train the start model, then each way; add what it reaches before and after."""
    tokenizer = build_tokenizer()
    if args.base:
        start = load_model(args.base, args.low, torch.float32)
    else:
        start = build_model(tokenizer, args.low, seed)
        if args.smooth:
            smooth(position_table(start))
        train(start, tokenizer, draw, seed=seed, batch_size=args.batch_size, num_steps=args.before)
    print(f"seed {seed}: similarity of neighbours {similarity(position_table(start)):.2f}", flush=True)
    for way in args.ways:
        model = at_size(start, args.low if way == "low" else args.high)
        if way == "high, random":
            torch.nn.init.normal_(position_table(model))
        before = measure(model, tokenizer, args)
        if way == "high":
            wide = measure(model, tokenizer, args, photo_px=2 * PHOTO_PX)
            print(f"seed {seed}, high, wide scenes, before: {', '.join(f'{value:.3f}' for value in wide)}", flush=True)
        train(model, tokenizer, draw, seed=seed + 100, batch_size=args.batch_size, num_steps=args.steps)
        found[way].append([*before, *measure(model, tokenizer, args)])
        print(f"seed {seed}, {way}: " + ", ".join(f"{value:.3f}" for value in found[way][-1]), flush=True)


def position_table(model: CogVLMForCausalLM) -> Tensor:
    """Return float[1 + side**2, width]: of the class token, then of the patches, row by row."""
    return model.model.vision.patch_embedding.position_embedding.weight.detach()


def smooth(table: Tensor) -> None:
    """Replace the entries of the patches by random mixtures of low waves along both sides, of the same mean norm."""
    side = math.isqrt(len(table) - 1)
    places = (torch.arange(side) + 0.5) / side
    waves = [wave(math.pi * k * places) for k in range(1, side // 2 + 1) for wave in (torch.sin, torch.cos)]
    rows, columns = (torch.stack(waves).repeat_interleave(side, 1), torch.stack(waves).repeat(1, side))
    mixed = torch.cat([rows, columns]).T @ torch.randn(2 * len(waves), table.shape[1])
    table[1:] = mixed * (table[1:].norm(dim=1).mean() / mixed.norm(dim=1).mean())


def similarity(table: Tensor) -> float:
    """Return the mean cosine of the entries of patches that are side by side."""
    side = math.isqrt(len(table) - 1)
    grid = table[1:].unflatten(0, (side, side))
    return float(torch.nn.functional.cosine_similarity(grid[:, 1:], grid[:, :-1], dim=-1).mean())


def draw(rng: random.Random) -> Shown:
    scene = make_scene(rng, PHOTO_PX, SIZES_PX, NUM_TARGETS)
    return scene.image, turns_of(scene.targets, scene.image.size)


def measure(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, args: argparse.Namespace, photo_px: int = PHOTO_PX
) -> list[float]:
    """Return the values of HEADS over held-out scenes."""
    rng = random.Random("held out")
    scenes = [make_scene(rng, photo_px, SIZES_PX, NUM_TARGETS) for _ in range(args.scenes)]
    rows = ask(model, tokenizer, [s.image for s in scenes], [[t.phrase for t in s.targets] for s in scenes])
    sides, right, off, widths = list[float](), list[bool](), list[float](), list[float]()
    for scene, row in zip(scenes, rows, strict=True):
        for target, answer in zip(scene.targets, row, strict=True):
            boxes = boxes_from_bins(parse_boxes(answer.text) or [], scene.image.size).tolist()
            x0, y0, x1, y1 = target.boxes_xyxy[0]
            sides.append(min(x1 - x0, y1 - y0))
            right.append(score_boxes(boxes, False, target.boxes_xyxy).iou >= 0.5)
            for a0, b0, a1, b1 in boxes[:1]:
                off += [abs(a0 + a1 - x0 - x1) / 2 * 1000 / photo_px, abs(b0 + b1 - y0 - y1) / 2 * 1000 / photo_px]
                widths.append((a1 - a0) / (x1 - x0))
    is_small, is_right = np.array(sides) < PATCH_PX * photo_px / args.low, np.array(right)
    parts = [
        float(part.mean()) if len(part) else float("nan")
        for part in (is_right, is_right[is_small], is_right[~is_small])
    ]
    return [*parts, *(float(np.median(values)) if values else float("nan") for values in (off, widths))]


if __name__ == "__main__":
    main()
