"""Compare training at a low and at a higher resolution on targets smaller than one patch.

    python bench/resolution.py [--low 8] [--high 16] [--steps 1600] [--before 0] [--scenes 13000]

The demo's scenes are 32 px wide and their objects 12 or 16 px. In a model input of 8 px each object is smaller than one
patch of 8 px. launch/train.py runs twice from the demo's start model with the same photos, questions, steps and
learning rates: once at the low resolution, once with a higher `model.image_size` and the interpolated position table.
--before N first trains the start model at the low resolution for N steps. Takes about 20 minutes on one core.

A position table of one patch cannot be interpolated: a model trained on one patch must relearn positions for four.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PHOTO_PX, PATCH_PX = 32, 8
CONFIG = "configs/demo.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--low", type=int, default=8, help="low resolution in px, a multiple of 8")
    parser.add_argument("--high", type=int, default=16, help="higher resolution in px, a multiple of 8")
    parser.add_argument("--steps", type=int, default=1600, help="steps of each run")
    parser.add_argument("--before", type=int, default=0, help="steps at the low resolution before both runs")
    parser.add_argument("--scenes", type=int, default=13000)
    parser.add_argument("--out", type=Path, help="folder for all outputs (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.out or Path(temporary)).resolve()
        shards, start = make_data(folder, args.scenes)
        if args.before:
            start = train(folder / "before", shards, start, args.low, args.before)
        for size_px in (args.low, args.high):
            began = time.perf_counter()
            train(folder / f"{size_px}px", shards, start, size_px, args.steps)
            before, after = (accuracy(scores, args.low) for scores in evaluations(folder / f"{size_px}px"))
            seconds = time.perf_counter() - began
            print(
                f"{size_px} px: acc@0.5 of targets under one patch {after:.3f} (before {before:.3f}), {seconds:.0f} s"
            )


def make_data(folder: Path, num_scenes: int) -> tuple[Path, Path]:
    """Make shards and a random model as the demo does; return both folders."""
    code = (
        "import sys; from pathlib import Path; from cogvlm_ft.launch import demo; "
        "from cogvlm_ft.config import load_config; "
        "folder, scenes = Path(sys.argv[1]), int(sys.argv[2]); "
        "demo.make_shards(folder / 'scenes', scenes, folder / 'shards'); "
        f"config = load_config('{CONFIG}', [f'model.path={{folder}}/model']); "
        "demo.make_start_model(folder / 'scenes', config)"
    )
    run(["-c", code, folder, num_scenes])
    return folder / "shards", folder / "model"


def train(out: Path, shards: Path, model: Path, size_px: int, num_steps: int) -> Path:
    """Train and export; return the folder of the exported model."""
    settings = {
        "output_dir": out,
        "data.shards": shards,
        "model.path": model,
        "model.image_size": size_px,
        "train.max_steps": num_steps,
        "train.epochs": 3,
        "evaluate.every_epochs": 1000,
        "tracking.mode": "disabled",
    }
    run(["launch/train.py", "--config", CONFIG, *(f"{key}={value}" for key, value in settings.items())])
    checkpoint = max((out / "checkpoints").glob("step-*"))
    run(["launch/export.py", "--checkpoint", checkpoint, "--out", out / "exported"])
    return out / "exported"


def run(arguments: list[object]) -> None:
    # One thread: matrices this small do not benefit from more.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=REPOSITORY, env=environment, capture_output=True)
    if done.returncode:
        sys.exit(done.stderr.decode(errors="replace")[-4000:])


def evaluations(run_folder: Path) -> list[Path]:
    """Return the evaluations before the first step and after the last."""
    found = sorted((run_folder / "evaluations").glob("step-*"))
    return [found[0], found[-1]]


def accuracy(evaluation: Path, low_px: int) -> float:
    """Return acc@0.5 of targets smaller than one patch at the low resolution."""
    hits = []
    for line in (evaluation / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        sides_px = [max(x1 - x0, y1 - y0) * low_px / PHOTO_PX for x0, y0, x1, y1 in row["truth_boxes_xyxy"]]
        if sides_px and max(sides_px) < PATCH_PX:
            hits.append(row["score"]["iou"] >= 0.5)
    return sum(hits) / len(hits)


if __name__ == "__main__":
    main()
