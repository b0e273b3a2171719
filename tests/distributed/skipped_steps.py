"""Train on every rank: steps of which one is not finite on one rank, then the same steps without that one.

Usage: skipped_steps.py MODEL SHARDS OUT STEP CASE...; STEP: from 0, the one that must be skipped in every case;
a CASE is a name and the settings that make it: NAME;key=value;key=value
"""

from __future__ import annotations

import json
import math
import sys

import torch

from cogvlm_ft.build import build_run
from cogvlm_ft.checkpoints.slices import layout_of, local_slices, local_specs
from cogvlm_ft.config import load_config
from cogvlm_ft.data.loader import read_steps
from cogvlm_ft.runtime.distributed import gather_to_main, init_distributed, is_main, rank, shut_down, world_size
from cogvlm_ft.train.step import train_step

NUM_STEPS = 5  # an epoch


def train(settings: list[str], left_out: int | None) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Return this rank's weights and moments after the steps, and what was reported of each step."""
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
    reported = []
    for step, batches in zip(range(NUM_STEPS), steps, strict=False):
        if step != left_out:
            stats = train_step(run.engine, batches, lr=1e-3 * (step + 1), seed=0, step=step)
            losses = stats.row_losses.tolist()
            reported.append(
                {"skipped": stats.is_skipped, "norm": stats.grad_norm, "finite": list(map(math.isfinite, losses))}
            )
    keys = [spec.name for spec in local_specs(run.engine)]
    slices = {key: tensor.clone() for key, tensor in zip(keys, local_slices(run.engine), strict=True)}
    slices["optimizer step"] = torch.tensor(layout_of(run.engine).optimizer_step)
    run.engine.destroy()
    return slices, reported


def main() -> None:
    model, shards, out, bad, *cases = sys.argv[1:]
    init_distributed()
    common = [f"model.path={model}", f"data.shards={shards}", f"output_dir={out}", "train.eps=1e-6"]
    common += ["train.global_batch_size=8", "train.micro_batch_size=4"]
    for case in cases:
        name, *settings = case.split(";")
        found, reported = train([*common, *settings], None)
        expected, _ = train([*common, *settings], int(bad))
        unequal = [key for key in expected if not torch.equal(found[key], expected[key])]
        everywhere = gather_to_main({"reported": reported, "unequal": unequal, "keys": len(found)})
        if is_main():
            print(json.dumps({"case": name, "ranks": everywhere}), flush=True)
    shut_down()


if __name__ == "__main__":
    main()
