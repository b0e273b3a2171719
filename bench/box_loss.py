"""Compare losses of coordinates at equal steps: cross entropy, an expected distance, GIoU, and weights of digits.

    python bench/box_loss.py [--base base/] [--steps 400] [--seeds 3] [--scenes 64] [--image-size 64]

A tiny model learns to find coloured boxes at continuous places and sizes. It is random, or with --base the one that
bench/small_targets.py --base trained with cross entropy until it finds boxes. All variants see the same scenes in the
same order and start from the same weights. Answers are read twice: as written, and with the expected coordinates.
A difference counts only if it exceeds the spread of the seeds, the largest minus the smallest value of any variant.
A model that finds nothing yet compares nothing: raise --steps until cross entropy reaches an acc@0.5 well above 0.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from small_scenes import Scene, Shown, ask, build_model, build_tokenizer, make_scene, train, turns_of

from cogvlm_ft.evaluate.generate import Answer
from cogvlm_ft.grounding.boxes import boxes_from_bins, read_boxes
from cogvlm_ft.grounding.overlap import pairwise_iou
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.model import load_model
from cogvlm_ft.model.box_loss import build_box_loss
from cogvlm_ft.settings import BoxLossConfig, TrainConfig

NUM_TARGETS, SIZES_PX, PATCH_PX = 2, (4.0, 28.0), 8
CROSS_ENTROPY = "cross entropy"
VARIANTS = {
    CROSS_ENTROPY: TrainConfig(),
    "expected": TrainConfig(box_loss=BoxLossConfig(weight=1.0, kind="expected")),
    "giou": TrainConfig(box_loss=BoxLossConfig(weight=0.3, kind="giou")),
    "digit weights 4 2 1": TrainConfig(digit_weights=[4.0, 2.0, 1.0]),
}
COLUMNS = ("mean IoU", "acc@0.5", "acc@0.75", "acc@0.9", "IoU < 1 patch", "IoU < 2 patches")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="model folder to start from (default: a random model)")
    parser.add_argument("--steps", type=int, default=400, help="of each run")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scenes", type=int, default=64, help="that are asked about after training")
    parser.add_argument("--image-size", type=int, default=64, help="px, a multiple of 8")
    args = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small do not benefit from more
    scores: dict[tuple[str, bool], list[list[float]]] = defaultdict(list)
    for seed in range(args.seeds):
        for name in VARIANTS:
            written, expected = run(name, seed, args)
            scores[name, False].append(written)
            scores[name, True].append(expected)
    print(table(scores))
    print(verdict({name: [row[2] for row in scores[name, False]] for name in VARIANTS}))


def run(name: str, seed: int, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Train one variant; return its columns as written and with expected coordinates."""
    tokenizer, size_px = build_tokenizer(), args.image_size

    def draw(rng: random.Random) -> Shown:
        scene = make_scene(rng, size_px, SIZES_PX, NUM_TARGETS)
        return scene.image, turns_of(scene.targets, scene.image.size)

    model = load_model(args.base, size_px, torch.float32) if args.base else build_model(tokenizer, size_px, seed)
    model.box_loss = build_box_loss(VARIANTS[name], tokenizer)
    train(model, tokenizer, draw, seed=seed, batch_size=args.batch_size, num_steps=args.steps)
    rng = random.Random("held out")
    scenes = [make_scene(rng, size_px, SIZES_PX, NUM_TARGETS) for _ in range(args.scenes)]
    rows = ask(model, tokenizer, [s.image for s in scenes], [[t.phrase for t in s.targets] for s in scenes])
    written, expected = (columns(scenes, rows, read_expected=each) for each in (False, True))
    print(f"seed {seed}, {name}: " + ", ".join(f"{value:.3f}" for value in written), flush=True)
    return written, expected


def columns(scenes: Sequence[Scene], rows: Sequence[Sequence[Answer]], *, read_expected: bool) -> list[float]:
    """Return the mean IoU, the accuracies, and the IoU of targets under one and under two patches."""
    answered = [
        (scene, *pair) for scene, row in zip(scenes, rows, strict=True) for pair in zip(scene.targets, row, strict=True)
    ]
    pairs = [(target.boxes_xyxy[0], answer, scene) for scene, target, answer in answered]
    ious = np.array([_iou(box, answer, scene, read_expected) for box, answer, scene in pairs])
    shorter = np.array([min(box[2] - box[0], box[3] - box[1]) for box, _, _ in pairs])
    accuracies = [float((ious >= least).mean()) for least in (0.5, 0.75, 0.9)]
    return [float(ious.mean()), *accuracies, _mean(ious[shorter < PATCH_PX]), _mean(ious[shorter < 2 * PATCH_PX])]


def _iou(truth: Box, answer: Answer, scene: Scene, read_expected: bool) -> float:
    read = read_boxes(answer.text, answer.digit_probs)
    if not read:
        return 0.0
    box = boxes_from_bins([read[0].expected if read_expected else read[0].bins], scene.image.size)
    return float(pairwise_iou(box, [truth]).item())


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def table(scores: dict[tuple[str, bool], list[list[float]]]) -> str:
    """Return a Markdown table of means over the seeds, with the spread of acc@0.75."""
    lines = [f"| loss | read as | {' | '.join(COLUMNS)} | spread of acc@0.75 |", "|---" * (len(COLUMNS) + 3) + "|"]
    for (name, read_expected), rows in scores.items():
        values = np.array(rows)
        means = " | ".join(f"{value:.3f}" for value in values.mean(axis=0))
        spread = values[:, 2].max() - values[:, 2].min()
        lines.append(f"| {name} | {'expected' if read_expected else 'written'} | {means} | {spread:.3f} |")
    return "\n".join(lines)


def verdict(acc75: dict[str, list[float]]) -> str:
    """Return the last line. acc75: of every seed, by variant."""
    base = float(np.mean(acc75[CROSS_ENTROPY]))
    gains = {name: float(np.mean(values)) - base for name, values in acc75.items() if name != CROSS_ENTROPY}
    best = max(gains, key=lambda name: gains[name])
    spread = max(max(values) - min(values) for values in acc75.values())
    kind = best if gains[best] > spread else "none"
    return f"best box loss: {kind}, acc@0.75 {gains[best]:+.3f} over cross-entropy, spread of seeds {spread:.3f}"


if __name__ == "__main__":
    main()
