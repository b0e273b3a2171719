"""Runs on every rank: a few real steps with each preset.

Usage: preset_steps.py MODEL SHARDS OUT PRESET[=PRECISION]...; a preset is a name in configs/deepspeed or a path.
"""

from __future__ import annotations

import json
import sys

from cogvlm_ft.config import load_config
from cogvlm_ft.data.loader import read_steps
from cogvlm_ft.runtime.distributed import all_reduce_sum, init_distributed, is_main, rank, shut_down, world_size
from cogvlm_ft.train.build import build_run
from cogvlm_ft.train.step import train_step

NUM_STEPS = 4


def losses(settings: list[str]) -> list[float]:
    """The mean loss per target token of every step."""
    config = load_config(None, settings)
    run = build_run(config)
    steps = read_steps(
        run.dataset,
        run.plan,
        0,
        rank=rank(),
        world_size=world_size(),
        micro_batch_size=config.train.micro_batch_size,
        num_workers=0,
    )
    found = []
    for step, batches in zip(range(NUM_STEPS), steps, strict=False):
        stats = train_step(run.engine, batches, lr=1e-3, seed=0, step=step)
        found.append(all_reduce_sum([float(stats.loss_sum)])[0] / stats.num_target_tokens)
    run.engine.destroy()
    return found


def main() -> None:
    model, shards, out, *presets = sys.argv[1:]
    init_distributed()
    settings = [f"model.path={model}", f"data.shards={shards}", f"output_dir={out}", "train.eps=1e-6"]
    settings += ["train.global_batch_size=8", "train.micro_batch_size=1"]
    for name in presets:
        preset, _, precision = name.partition("=")
        path = preset if preset.endswith(".json") else f"configs/deepspeed/{preset}.json"
        found = losses([*settings, f"deepspeed={path}", f"train.precision={precision or 'fp32'}"])
        if is_main():
            print(json.dumps({"preset": name, "losses": found}), flush=True)
    shut_down()


if __name__ == "__main__":
    main()
