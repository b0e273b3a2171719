"""Compare adapters with full fine-tuning: gain in mean IoU, trained parameters, time of a step, peak memory.

    python bench/adapter.py [--photos 8000] [--start-steps 1600] [--steps 600] [--rank 4] [--folder FOLDER]

The demo's model learns scenes of some colours: the start. From there it learns scenes of other colours, once in full
and twice by adapters: beside frozen weights in fp32, and in int4. The latter are also merged into the weights in fp32,
beside which they were not trained. Scores are on scenes that the model has not seen.
--folder keeps what was made: the same command resumes there, and bench/forgetting.py uses the same start.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvlm_ft.build import load_tokenizer
from cogvlm_ft.checkpoints.checkpoint import list_checkpoints
from cogvlm_ft.config import load_config
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import open_split
from cogvlm_ft.data.record import record_from_json
from cogvlm_ft.evaluate.evaluate import evaluate
from cogvlm_ft.export.export import export_checkpoint
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model import load_model
from cogvlm_ft.rehearsal.tiny_model import save_tiny_model, texts_of
from cogvlm_ft.rehearsal.training import SCHEDULE, start_training
from cogvlm_ft.shards.build import main as build
from cogvlm_ft.shards.demo_scenes import COLOURS, write_scenes
from cogvlm_ft.tracking.metrics_log import read_rows

IMAGE_PX, BATCH_SIZE = 32, 16
NUM_VAL = 200
RANK = 4  # 4 % of the parameters of a model this small
WORDING = "configs/demo_wording.yaml"
TARGETS = "adapter.targets=[attention.language,attention.vision_expert,mlp.language,mlp.vision_expert,vision,bridge]"
INT4 = "adapter.base=int4"
OLD, NEW = ("red", "green", "blue"), ("yellow", "black", "white")  # colours of the start's scenes, and of the new ones


@dataclass(frozen=True)
class Prepared:
    """Shards of both sets of scenes, and the model that has learned the old ones."""

    old: Path
    new: Path
    start: Path


@dataclass(frozen=True)
class Trained:
    """A run. step_s: median; memory_gib: peak of the process."""

    folder: Path
    iou: float
    step_s: float
    memory_gib: float

    @property
    def checkpoint(self) -> Path:
        return list_checkpoints(self.folder / "checkpoints")[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser)
    parser.add_argument("--rank", type=int, default=RANK, help=f"of the adapters (default: {RANK})")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        made = prepare(folder, args)
        full = train(folder / "full", {made.new: 1.0}, made.start, args.steps)
        lora = train(folder / "lora", {made.new: 1.0}, made.start, args.steps, *adapter_settings(args.rank))
        int4 = train(folder / "int4", {made.new: 1.0}, made.start, args.steps, *adapter_settings(args.rank), INT4)
        merged = score(export(int4.checkpoint, folder / "int4 merged"), made.new)
        before = first_iou(full.folder)
        print(f"start: IoU {before:.3f} on the new scenes")
        for name, each in (("full", full), ("LoRA", lora)):
            print(f"{name}: IoU {each.iou:.3f}, step {1000 * each.step_s:.0f} ms, peak {each.memory_gib:.2f} GiB")
        print(f"LoRA beside int4: IoU {int4.iou:.3f}; merged into fp32: {merged:.3f}")
        gain = (lora.iou - before) / max(full.iou - before, 1e-9)
        percent = 100 * num_elements(lora.checkpoint) / num_elements(full.checkpoint)
        speed, memory = full.step_s / lora.step_s, lora.memory_gib / full.memory_gib
        print(
            f"LoRA: {gain:.2f} of the full gain with {percent:.1f} % of the parameters, step {speed:.2f} x as fast, "
            f"peak {memory:.2f} x"
        )


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide how long it takes."""
    parser.add_argument("--photos", type=int, default=8000, help="of each set of scenes (default: 8000)")
    parser.add_argument("--start-steps", type=int, default=1600, help="of the start (default: 1600)")
    parser.add_argument("--steps", type=int, default=600, help="of each run from the start (default: 600)")
    parser.add_argument("--folder", type=Path, help="keep everything there (default: a temporary folder)")


def adapter_settings(rank: int) -> list[str]:
    return [f"adapter.rank={rank}", f"adapter.alpha={2 * rank}", TARGETS, "train.lr=4e-3"]


def prepare(folder: Path, args: argparse.Namespace) -> Prepared:
    """Draw both sets of scenes, and train the start on the old one."""
    made = Prepared(folder / OLD[0] / "shards", folder / NEW[0] / "shards", folder / "start")
    if (made.start / "model.safetensors").exists():
        return made
    old, new = (make_shards(folder / colours[0], colours, args.photos) for colours in (OLD, NEW))
    wording = load_wording(WORDING)
    records = [
        record_from_json(json.dumps(row).encode(), row["image"]) for shards in (old, new) for row in rows_of(shards)
    ]
    save_tiny_model(folder / "random", texts_of(records, wording, seed=0), IMAGE_PX)
    run = train(folder / "before", {old: 1.0}, folder / "random", args.start_steps)
    print(f"start: IoU {run.iou:.3f} on its own scenes", flush=True)
    export(run.checkpoint, made.start)
    return made


def export(checkpoint: Path, out: Path, **options: Any) -> Path:
    """Write a model folder, if it is not there already, and return it."""
    import torch

    if not out.exists():
        export_checkpoint(checkpoint, out, torch.float32, verify=False, **options)
    return out


def make_shards(folder: Path, colours: tuple[str, ...], num_photos: int) -> Path:
    """Build shards of scenes whose targets have these colours alone, and all are present."""
    if (folder / "shards" / "index.json").exists():
        return folder / "shards"
    words = [word for colour in colours for word in (colour, COLOURS[colour][0])]
    annotations = write_scenes(folder / "scenes", 2 * num_photos, IMAGE_PX, seed=len(colours[0]))
    kept: list[dict[str, Any]] = []
    for line in annotations.read_text(encoding="utf-8").splitlines():
        scene = json.loads(line)
        targets = [each for each in scene["targets"] if each["boxes"] and any(word in each["phrase"] for word in words)]
        if targets and len(kept) < num_photos:
            kept.append({"image": scene["image"], "targets": targets})
    annotations.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    arguments = ["--format", "jsonl", "--images", folder / "scenes", "--annotations", annotations]
    val_fraction = min(0.5, NUM_VAL / len(kept))
    assert build([str(each) for each in (*arguments, "--out", folder / "shards", "--val-fraction", val_fraction)]) == 0
    return folder / "shards"


def rows_of(shards: Path) -> list[dict[str, Any]]:
    """Return the first scenes of a set as records."""
    lines = (shards.parent / "scenes" / "annotations.jsonl").read_text(encoding="utf-8").splitlines()[:500]
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["image_size_px"] = (IMAGE_PX, IMAGE_PX)
        row["targets"] = [{**target, "boxes_xyxy": target["boxes"]} for target in row["targets"]]
    return rows


def settings_of(model: Path, num_steps: int, shown: dict[Path, float]) -> dict[str, Any]:
    """Return the settings of a run of one epoch. shown: shards, and the fraction of the shown photos from each.

    The first are validated on.
    """
    shards = [
        {"path": str(path), "weight": fraction * num_steps * BATCH_SIZE / len(load_index(path, "train"))}
        for path, fraction in shown.items()
    ]
    return {
        **SCHEDULE,
        "deepspeed": "single_gpu",
        "model.path": model,
        "model.gradient_checkpointing": "none",
        "data.shards": json.dumps(shards),
        "data.val_shards": next(iter(shown)),
        "data.wording": WORDING,
        "data.num_workers": 0,
        "train.lr": 1e-3,
        "train.epochs": 1,
        "train.max_steps": num_steps,
        "train.global_batch_size": BATCH_SIZE,
        "train.micro_batch_size": BATCH_SIZE,
        "train.log_every": 1,
        "evaluate.batch_size": 32,
        "evaluate.num_pictures": 0,
        "tracking.mode": "disabled",
    }


def train(out: Path, shown: dict[Path, float], model: Path, num_steps: int, *changes: str) -> Trained:
    """Run launch/train.py in one process, and return what it logged. A run that is there already is not repeated."""
    settings = settings_of(model, num_steps, shown)
    arguments = [f"output_dir={out}", *(f"{key}={value}" for key, value in settings.items()), *changes]
    if not start_training(out, arguments, 1).is_finished:
        raise SystemExit(f"training in {out} failed")
    rows = read_rows(out / "metrics.jsonl")
    steps = [row for row in rows if row["kind"] == "train"]
    return Trained(
        out,
        float([row for row in rows if row["kind"] == "val"][-1]["mean_iou"]),
        statistics.median(float(row["step_s"]) for row in steps),
        max(float(row["memory_gib"]) for row in steps),
    )


def score(folder: Path, shards: Path) -> float:
    """Return the mean IoU of a model folder on the validation scenes of a set."""
    model = load_model(folder)
    settings = settings_of(folder, 1, {shards: 1.0})
    config = load_config(None, ["output_dir=unused", *(f"{key}={value}" for key, value in settings.items())])
    reader, wording = open_split(config, "val"), load_wording(config.data.wording)
    tokenizer = load_tokenizer(folder, model.config)
    return evaluate(model, tokenizer, reader, wording, config.evaluate, seed=0).metrics["mean_iou"]


def first_iou(run: Path) -> float:
    """Return the mean IoU before the first step."""
    return float(next(row["mean_iou"] for row in read_rows(run / "metrics.jsonl") if row["kind"] == "val"))


def num_elements(checkpoint: Path) -> int:
    """Return the elements of the tensors that a checkpoint holds."""
    import math

    from cogvlm_ft.checkpoints.slices import open_slices

    return sum(math.prod(tensor.shape) for tensor in open_slices(checkpoint).values())


if __name__ == "__main__":
    main()
