"""The training run on two ranks that many tests compare with."""

from __future__ import annotations

from pathlib import Path

from tiny import run_settings

NUM_STEPS = 10
NUM_SAMPLES = 33  # an epoch has steps of 12, 12 and 9 samples; the last is filled up with 3 of weight 0
SETTINGS = (
    "deepspeed=zero3",  # what a user's run has
    f"train.max_steps={NUM_STEPS}",
    "train.global_batch_size=12",  # 2 ranks x 3 samples x 2 micro-batches; 1, 3 and 4 ranks can share it too
    "train.micro_batch_size=3",
    "train.lr=2e-3",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=9",
)
RATES = ("images_per_s", "turns_per_s", "tokens_per_s", "tflops", "mfu")
SLOWEST = ("slowest_rank", "slowest_rank_ratio", "slowest_rank_data_wait_s")
VOLATILE = (*RATES, *SLOWEST, "step_s", "data_wait_fraction", "memory_gib")


def reference_settings(shards: Path, start_model: Path, output_dir: Path, *changes: str) -> list[str]:
    return run_settings(shards, start_model, output_dir, *SETTINGS, *changes)
