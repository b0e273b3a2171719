"""Run every step on one machine: draw a grounding set, build shards, train a tiny CogVLM, print its metrics.

Uses all GPUs, or two processes on the CPU. Everything is written to runs/demo in the current folder; finished steps
are not repeated, so the same command resumes an interrupted demo.

Examples:
  python launch/demo.py
  python launch/demo.py --num-scenes 1000 train.epochs=1
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from cogvlm_ft.command_line import build_parser, exit_code, paste
    from cogvlm_ft.config import load_config
    from cogvlm_ft.rehearsal.own_folder import own_folder
    from cogvlm_ft.run_folder import RunFolder, step_folders
    from cogvlm_ft.runtime.run_lock import Use
    from cogvlm_ft.settings import Config
    from cogvlm_ft.terminal import check_encoding, say
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

if TYPE_CHECKING:
    from cogvlm_ft.rehearsal.training import Ended

CONFIG = "demo"  # configs/demo.yaml
NUM_SCENES = 13000
IMAGE_SIZE = 32
VAL_FRACTION = 0.02


def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument(
        "--num-scenes", type=int, default=NUM_SCENES, help=f"number of images to draw (default: {NUM_SCENES})"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that override configs/demo.yaml")
    args = parser.parse_intermixed_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    check_encoding()
    config = load_config(CONFIG, args.settings)
    folder = config.output_path.parent
    with own_folder(folder, config.output_path, Use("demo", str(folder), "output_dir")):
        return run_alone(args, config)


def run_alone(args: argparse.Namespace, config: Config) -> int:
    scenes = config.output_path.parent / "scenes"
    make_shards(scenes, args.num_scenes, Path(config.data.shards))
    make_start_model(scenes, config)
    start = time.perf_counter()
    ended = train(config.output_path, args.settings)
    if not ended.is_finished:
        say(f"\nThe demo is not finished; to resume it, run:\n  {paste('demo', *own_arguments(args))}")
        return ended.code
    show(config, time.perf_counter() - start)
    return 0


def own_arguments(args: argparse.Namespace) -> list[str]:
    given = ["--num-scenes", str(args.num_scenes)] if args.num_scenes != NUM_SCENES else []
    return [*given, *args.settings]


def make_shards(scenes: Path, num_scenes: int, shards: Path) -> None:
    """Draw coloured shapes with Chinese and English phrases, some of them absent, and build shards of them."""
    from cogvlm_ft.shards.build import main as build
    from cogvlm_ft.shards.demo_scenes import write_scenes

    if (shards / "index.json").exists():
        return
    say(f"1. drawing {num_scenes} images of {IMAGE_SIZE} px in {scenes}", flush=True)
    annotations = write_scenes(scenes, num_scenes, IMAGE_SIZE, seed=0)
    say(f"2. building shards in {shards}", flush=True)
    arguments = ["--format", "jsonl", "--images", scenes, "--annotations", annotations, "--out", shards]
    if build([*map(str, arguments), "--val-fraction", str(VAL_FRACTION)]):
        raise SystemExit("the shards could not be built")


def make_start_model(scenes: Path, config: Config) -> None:
    """Save a random CogVLM of the published architecture, with 2 million parameters, and a tokenizer for it."""
    from cogvlm_ft.data.record import record_from_json
    from cogvlm_ft.grounding.wording import load_wording
    from cogvlm_ft.rehearsal.tiny_model import save_tiny_model, texts_of

    folder = config.model.folder
    if (folder / "model.safetensors").exists():
        return
    say(f"3. creating a tiny CogVLM in {folder}", flush=True)
    records = []
    for line in (scenes / "annotations.jsonl").read_text(encoding="utf-8").splitlines()[:500]:
        scene = json.loads(line)
        targets = [{**target, "boxes_xyxy": target["boxes"]} for target in scene["targets"]]
        fields = {"targets": targets, "image_size_px": (IMAGE_SIZE, IMAGE_SIZE)}
        records.append(record_from_json(json.dumps(fields).encode(), scene["image"]))
    texts = texts_of(records, load_wording(config.data.wording), seed=0, num_epochs=1)
    save_tiny_model(folder, texts, IMAGE_SIZE)


def train(run: Path, settings: list[str]) -> Ended:
    """Run the command that a user would type, on all GPUs or on two processes."""
    import torch

    from cogvlm_ft.rehearsal.training import start_training

    num_gpus = torch.cuda.device_count()
    say("4. training:", "launch/train.py", "--config", CONFIG, *settings, flush=True)
    return start_training(run, ["--config", CONFIG, *settings], num_gpus or 2, on_cpu=not num_gpus)


def show(config: Config, seconds: float) -> None:
    """Print the metrics of every epoch, and the paths of the results."""
    run = config.output_path
    say(f"\ntraining took {seconds / 60:.1f} min\n")
    say("epoch  mean IoU  acc@0.5  absent targets answered 'not found'  unreadable")
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["kind"] == "val":
            say(
                f"{row['epoch']:5.3g}  {row['mean_iou']:8.3f}  {row['acc@0.5']:7.3f}"
                f"  {row['not_found_acc']:35.3f}  {row['unreadable']:10.3f}"
            )
    checkpoint = step_folders(RunFolder(run).checkpoints)[-1]
    evaluation = step_folders(RunFolder(run).evaluations)[-1]
    wandb_run = sorted((run / "wandb").glob("*run-*"))[-1:]
    say(f"\nreport       {run / 'report.html'}\ncheckpoint   {checkpoint}\nmetrics      {run / 'metrics.jsonl'}")
    say(f"predictions  {evaluation / 'predictions.jsonl'}\nimages       {evaluation / 'pictures'}")
    say(f"W&B run      {wandb_run[0] if wandb_run else 'none'}")
    export = paste("export", "--checkpoint", checkpoint, "--out", run.parent / "exported")
    say(f"\nTo export the model, run:\n  {export}")


if __name__ == "__main__":
    sys.exit(main())
