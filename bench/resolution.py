"""What raising the resolution gives small targets: one start at 16 px, then as many steps more at 16 px and at 32 px.

    python bench/resolution.py [--steps 800] [--scenes 13000] [--out runs/resolution]

The demo's scenes are 32 px wide; in a model input of 16 px, two thirds of their things are smaller than one patch of
8 px. The demo's tiny model learns them at 16 px by launch/train.py. From its export two trainings go on with the same
photos, questions, steps and learning rates: one at 16 px, one with `model.image_size=32` and the interpolated position
table. Takes about 15 minutes of one core.
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
LOW_PX, HIGH_PX, PHOTO_PX, PATCH_PX = 16, 32, 32, 8
CONFIG = "configs/demo.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="of each of the three trainings")
    parser.add_argument("--scenes", type=int, default=13000)
    parser.add_argument("--out", type=Path, help="folder to keep; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.out or Path(temporary)).resolve()
        shards, model = make_data(folder, args.scenes)
        start = train(folder / "start", shards, model, LOW_PX, args.steps)
        for size_px in (LOW_PX, HIGH_PX):
            began = time.perf_counter()
            train(folder / f"{size_px}px", shards, start, size_px, args.steps)
            before, after = (accuracy(scores) for scores in evaluations(folder / f"{size_px}px"))
            shown = [f"{now:.3f} (before {then:.3f})" for now, then in zip(after, before, strict=True)]
            seconds = time.perf_counter() - began
            print(
                f"{size_px} px: acc@0.5 of small targets {shown[0]}, of others {shown[1]}; {seconds:.0f} s", flush=True
            )


def make_data(folder: Path, num_scenes: int) -> tuple[Path, Path]:
    """(shards, a random model), as the demo makes them."""
    code = (
        "import sys; from pathlib import Path; from launch import demo; from cogvlm_ft.config import load_config; "
        "folder, scenes = Path(sys.argv[1]), int(sys.argv[2]); "
        "demo.make_shards(folder / 'scenes', scenes, folder / 'shards'); "
        f"config = load_config('{CONFIG}', [f'model.path={{folder}}/model']); "
        "demo.make_start_model(folder / 'scenes', config)"
    )
    run(["-c", code, folder, num_scenes])
    return folder / "shards", folder / "model"


def train(out: Path, shards: Path, model: Path, size_px: int, num_steps: int) -> Path:
    """The folder of the exported model."""
    settings = {
        "output_dir": out,
        "data.shards": shards,
        "model.path": model,
        "model.image_size": size_px,
        "train.max_steps": num_steps,
        "evaluate.every_epochs": 1000,
        "tracking.mode": "disabled",
    }
    run(["launch/train.py", "--config", CONFIG, *(f"{key}={value}" for key, value in settings.items())])
    checkpoint = max((out / "checkpoints").glob("step-*"))
    run(["launch/export.py", "--checkpoint", checkpoint, "--out", out / "exported"])
    return out / "exported"


def run(arguments: list[object]) -> None:
    # One thread: matrices this small gain nothing from more.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=REPOSITORY, env=environment, capture_output=True)
    if done.returncode:
        sys.exit(done.stderr.decode(errors="replace")[-4000:])


def evaluations(run_folder: Path) -> list[Path]:
    """Before the first step, and after the last."""
    found = sorted((run_folder / "evaluations").glob("step-*"))
    return [found[0], found[-1]]


def accuracy(evaluation: Path) -> tuple[float, float]:
    """acc@0.5 of things smaller than one patch at LOW_PX, and of the others."""
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for line in (evaluation / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["truth_boxes_xyxy"]:
            sides_px = [max(x1 - x0, y1 - y0) * LOW_PX / PHOTO_PX for x0, y0, x1, y1 in row["truth_boxes_xyxy"]]
            hits[max(sides_px) < PATCH_PX].append(row["score"]["iou"] >= 0.5)
    return sum(hits[True]) / len(hits[True]), sum(hits[False]) / len(hits[False])


if __name__ == "__main__":
    main()
