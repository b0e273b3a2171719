"""Tiny model configs and the settings of tiny training runs: one base of each, and what a test changes in it."""

from __future__ import annotations

from pathlib import Path

from cogvlm_ft.model import CogVLMConfig

SETTINGS = (
    "plan=ignore",  # the estimate takes as long as five steps
    "deepspeed=zero3_tiny",
    "data.num_workers=0",
    "train.epochs=10",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.lr=1e-3",
    # The gradient of a key bias is zero but for rounding noise (softmax does not see it). At eps 1e-8 Adam would turn
    # that noise into full steps, with another sign in every summation order.
    "train.eps=1e-6",
    "train.patience=null",
    "evaluate.max_new_tokens=4",
    "tracking.mode=disabled",
)

# What a user's run has. Not in SETTINGS, since many tests are about neither and need half the time without.
AS_SHIPPED = ("plan=refuse", "deepspeed=zero3")


def run_settings(shards: Path, model: Path, output_dir: Path, *changes: str) -> list[str]:
    """Return the settings of a tiny run; `changes` come last, so they win."""
    return [f"output_dir={output_dir}", f"model.path={model}", f"data.shards={shards}", *SETTINGS, *changes]


def short_run_settings(shards: Path, model: Path, output_dir: Path, *changes: str) -> list[str]:
    """Return the settings of two steps and two validation samples."""
    short = ["train.max_steps=2", "train.global_batch_size=4", "train.micro_batch_size=2", "evaluate.max_samples=2"]
    return run_settings(shards, model, output_dir, *short, *changes)


def tiny_config(vision: dict[str, int] | None = None, **changes: object) -> CogVLMConfig:
    """Return the config of a model with two layers of 64 and a vision tower of two layers of 48, for 56 px."""
    base = dict(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        initializer_range=0.1,
        template_version="base",
    )
    tower = dict(
        hidden_size=48, num_heads=3, intermediate_size=96, num_hidden_layers=2, image_size=56, num_positions=17
    )
    return CogVLMConfig(**{**base, **changes}, vision_config={**tower, **(vision or {})})


def odd_config(**changes: object) -> CogVLMConfig:
    """Return a config whose tensors include sizes that two ranks cannot divide evenly."""
    odd = dict(hidden_size=60, intermediate_size=99, num_attention_heads=3, initializer_range=0.08)
    return tiny_config(vision=dict(hidden_size=45, intermediate_size=63), **{**odd, **changes})
