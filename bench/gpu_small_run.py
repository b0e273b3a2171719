"""A small model, drawn photos and shards of them for the parts of bench/gpu.py that start engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from cogvlm_ft.build import Run, build_run
from cogvlm_ft.config import load_config
from cogvlm_ft.data.collate import Batch
from cogvlm_ft.data.loader import read_steps
from cogvlm_ft.model import CogVLMConfig, CogVLMForCausalLM, CogVLMTokenizer
from cogvlm_ft.model.tokenizer import MODEL_FILE, train_tokenizer
from cogvlm_ft.runtime.distributed import rank, world_size
from cogvlm_ft.settings import Config
from cogvlm_ft.shards.build import main as build_shards
from cogvlm_ft.shards.demo_scenes import write_scenes
from cogvlm_ft.train.step import StepStats, train_step

IMAGE_SIZE, NUM_SCENES, NUM_PATCHES = 56, 48, 16
TEXTS = [
    f"{word}[[{n:03d},{999 - n:03d},086,540]] 图片中存在一只狗,所在区域为" for n, word in enumerate(("a", "red", "dog"))
]
LR = 1e-3


def write_small_files(out: Path, *, tiny: bool) -> Path:
    """Return the folder with model/ and shards/, made at the first call."""
    folder = out / "small"
    if (folder / "ready").exists():
        return folder
    annotations = write_scenes(folder / "scenes", NUM_SCENES, IMAGE_SIZE, seed=0)
    write_shards(annotations, folder / "shards")
    train_tokenizer(TEXTS, folder / MODEL_FILE, vocab_size=360)
    tokenizer = CogVLMTokenizer.from_folder(folder)
    torch.manual_seed(0)
    model = CogVLMForCausalLM(small_config(len(tokenizer), tiny=tiny))
    model.save_pretrained(folder / "model")
    tokenizer.save(folder / "model")
    (folder / "ready").touch()
    return folder


def write_shards(annotations: Path, shards: Path) -> None:
    arguments = ["--format", "jsonl", "--images", annotations.parent, "--annotations", annotations, "--out", shards]
    if build_shards([*map(str, arguments), "--val-fraction", "0.25"]):
        raise RuntimeError(f"{shards}: the shards could not be built")


def small_config(vocab_size: int, *, tiny: bool) -> CogVLMConfig:
    """Return a config of 0.2 million parameters, or of 170 million, so that memory can be measured."""
    width, layers = (64, 1) if tiny else (1024, 6)
    vision = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "num_heads": 4}
    return CogVLMConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4 if tiny else 8,
        rms_norm_eps=1e-5,
        initializer_range=0.08 if tiny else 0.03,
        template_version="base",
        vision_config={**vision, "image_size": IMAGE_SIZE, "num_positions": NUM_PATCHES + 1},
    )


def run_config(setup: Any, name: str, *changes: str) -> Config:
    """Return the settings of a run of the small model."""
    folder = write_small_files(setup.out, tiny=setup.tiny)
    settings = [f"model.path={folder}/model", f"data.shards={folder}/shards", f"output_dir={setup.out}/runs/{name}"]
    settings += ["train.global_batch_size=4", "train.micro_batch_size=2", "data.num_workers=0", "train.epochs=100"]
    settings += ["train.eps=1e-6", "tracking.mode=disabled", "evaluate.max_new_tokens=4", "evaluate.max_samples=4"]
    return load_config(None, [*settings, *changes])


def build_small_run(setup: Any, name: str, *changes: str) -> Run:
    return build_run(run_config(setup, name, *changes))


def batches_of(run: Run, first: int, count: int) -> list[list[Batch]]:
    """Return this rank's micro-batches of `count` steps from step `first` on."""
    train = run.config.train
    steps = read_steps(
        run.dataset,
        run.plan,
        first * train.global_batch_size,
        rank=rank(),
        world_size=world_size(),
        micro_batch_size=train.micro_batch_size,
        num_workers=0,
    )
    return [batches for _, batches in zip(range(count), steps, strict=False)]


def train_steps(run: Run, steps: list[list[Batch]], first: int = 0) -> list[StepStats]:
    return [train_step(run.engine, batches, lr=LR, seed=0, step=first + n) for n, batches in enumerate(steps)]


def losses(stats: list[StepStats]) -> list[float]:
    """Return each step's loss per target token, of this rank's part."""
    return [float(each.loss_sum) / each.num_target_tokens for each in stats]


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
