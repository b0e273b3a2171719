"""A request to stop in every phase of a run: it saves, ends with 0, and the next start finishes the run."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from typing import Any
from unittest.mock import patch

from gpu_lines import Line
from gpu_small_run import run_config

from cogvlm_ft.checkpoints.checkpoint import list_checkpoints, read_state
from cogvlm_ft.run_folder import RunFolder

NUM_STEPS = 6
# Where the signal is sent: at the first call of this function.
PHASES = {
    "start": ("cogvlm_ft.build", "build_run"),
    "training": ("cogvlm_ft.train.loop", "train_step"),
    "saving": ("cogvlm_ft.checkpoints.saver", "write_tensors"),
    "evaluation": ("cogvlm_ft.evaluate.evaluate", "generate_answers"),
}


def check_signals(setup: Any) -> list[Line]:
    """Send SIGUSR1, as Slurm does before a job's time is over, in each phase."""
    context: Any = multiprocessing.get_context("spawn" if setup.device == "cuda" else "fork")
    lines = []
    for phase in ["evaluation"] if setup.tiny else PHASES:
        config = run_config(setup, f"signal-{phase}")
        folder = RunFolder(config.output_path).checkpoints
        codes, steps = [], []
        for stop_in in (phase, None):
            process = context.Process(target=train, args=(setup, phase, stop_in))
            process.start()
            process.join()
            codes.append(process.exitcode)
            steps.append(read_state(list_checkpoints(folder)[-1]).step if list_checkpoints(folder) else 0)
        is_right = codes == [0, 0] and 0 <= steps[0] <= NUM_STEPS and steps[1] == NUM_STEPS
        found = f"exit codes {codes}, saved at steps {steps}; expected 0, 0 and a last step of {NUM_STEPS}"
        lines.append(Line(f"a signal during {phase}", is_right, found))
    return lines


def train(setup: Any, phase: str, stop_in: str | None) -> None:
    """Run launch/train.py in this process."""
    from cogvlm_ft.launch.train import main

    config = run_config(setup, f"signal-{phase}")
    settings = [
        f"model.path={config.model.path}",
        f"data.shards={config.data.shards}",
        f"output_dir={config.output_dir}",
    ]
    settings += [f"train.max_steps={NUM_STEPS}", "checkpoint.every_steps=2", "plan=ignore", "train.hang_timeout_s=200"]
    settings += [f"{room}.{key}={value}" for room, key, value in changed(asdict(config))]
    if stop_in is None:
        raise SystemExit(main(settings))
    module, name = PHASES[stop_in]
    with patch.object(
        importlib.import_module(module), name, signalling(getattr(importlib.import_module(module), name))
    ):
        raise SystemExit(main(settings))


def changed(config: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """Return the settings of the small run that are not those of a run by default."""
    keys = {
        "train": ("global_batch_size", "micro_batch_size", "epochs", "eps"),
        "data": ("num_workers",),
        "evaluate": ("max_new_tokens", "max_samples"),
        "tracking": ("mode",),
    }
    return [(room, key, config[room][key]) for room, names in keys.items() for key in names]


def signalling(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, which sends a signal to this process when it is called first."""
    sent: list[int] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if not sent:
            sent.append(signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)
        return function(*args, **kwargs)

    return call
