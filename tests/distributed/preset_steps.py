"""Train a few steps with each preset on every rank, and the last ones again from a checkpoint.

Usage: preset_steps.py MODEL SHARDS OUT PRESET[=PRECISION][+evaluated][+resumed]...; a preset is a name in
configs/deepspeed or a path. "+evaluated" evaluates before every step. "+resumed" resumes from the checkpoint that the
same without it has left in OUT.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

from cogvlm_ft.build import build_run
from cogvlm_ft.checkpoints.checkpoint import TrainState, load_checkpoint
from cogvlm_ft.checkpoints.saver import CheckpointSaver
from cogvlm_ft.config import load_config
from cogvlm_ft.data.loader import read_steps
from cogvlm_ft.evaluate.evaluate import evaluate
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.run_folder import step_name
from cogvlm_ft.runtime import engine as engine_module
from cogvlm_ft.runtime.distributed import all_reduce_sum, init_distributed, is_main, rank, shut_down, world_size
from cogvlm_ft.settings import CheckpointConfig
from cogvlm_ft.train.step import train_step

NUM_STEPS, SAVED_STEP = 3, 2
WITH_CPU_ADAM = "COGVLM_TEST_CPU_ADAM"  # set: what offloads uses DeepSpeed's Adam in fp32, as on a GPU


def losses(settings: list[str], checkpoints: Path, first_step: int, *, evaluated: bool, like_gpu: bool) -> list[float]:
    """Return each step's mean loss per target token; from a checkpoint if first_step is not 0, else save one.

    like_gpu: whether the engine is built as for a GPU, with DeepSpeed's Adam where the optimizer is offloaded.
    """
    config = load_config(None, settings)
    with patch.object(engine_module, "device", lambda: torch.device("cuda" if like_gpu else "cpu")):
        run = build_run(config)
    assert isinstance(run.engine.optimizer.optimizer, DeepSpeedCPUAdam) == like_gpu
    saver = CheckpointSaver(run.engine, checkpoints, run.save_model_files, CheckpointConfig())
    if first_step:
        load_checkpoint(run.engine, checkpoints / step_name(first_step))
    steps = read_steps(
        run.dataset,
        run.plan,
        first_step * config.train.global_batch_size,
        rank=rank(),
        world_size=world_size(),
        micro_batch_size=config.train.micro_batch_size,
        num_workers=0,
    )
    found = []
    for step, batches in zip(range(first_step, NUM_STEPS), steps, strict=False):
        if evaluated:
            evaluate(run.model, run.tokenizer, run.val_reader, load_wording("box"), config.evaluate, seed=0)
        if step == SAVED_STEP and not first_step:
            saver.start(TrainState(step=step))  # it is written while the next steps change the weights
        stats = train_step(run.engine, batches, lr=1e-3, seed=0, step=step)
        found.append(all_reduce_sum([float(stats.loss_sum)])[0] / stats.num_target_tokens)
    saver.finish()
    run.engine.destroy()
    return found


def main() -> None:
    model, shards, out, *presets = sys.argv[1:]
    init_distributed()
    settings = [f"model.path={model}", f"data.shards={shards}", f"output_dir={out}", "train.eps=1e-6"]
    settings += ["train.global_batch_size=4", f"train.micro_batch_size={4 // world_size()}", "evaluate.max_samples=2"]
    settings += ["evaluate.max_new_tokens=2"]
    for name in presets:
        own_name, *changes = name.split("+")
        preset, _, precision = own_name.partition("=")
        path = preset if preset.endswith(".json") else f"configs/deepspeed/{preset}.json"
        own = [*settings, f"deepspeed={path}", f"train.precision={precision or 'fp32'}"]
        like_gpu = WITH_CPU_ADAM in os.environ and "offload" in preset and not precision
        first_step, evaluated = SAVED_STEP * ("resumed" in changes), "evaluated" in changes
        found = losses(own, Path(out, Path(own_name).name), first_step, evaluated=evaluated, like_gpu=like_gpu)
        if is_main():
            print(json.dumps({"preset": name, "losses": found}), flush=True)
    shut_down()


if __name__ == "__main__":
    main()
