"""Fine-tune CogVLM.

    deepspeed launch/train.py --config configs/grounding_490.yaml model.path=... data.shards=... [key=value ...]

Runs the same under deepspeed, torchrun, srun and plain python. Every key is described in cogvlm_ft/config.py.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from cogvlm_ft.config import Config
from cogvlm_ft.errors import CheckpointError, ConfigError, DataError
from cogvlm_ft.jobs.sweep import load_task
from cogvlm_ft.runtime.outcome import write_outcome
from cogvlm_ft.runtime.stop_signals import StopRequest


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file of settings")
    parser.add_argument("--sweep", type=Path, help="YAML of overrides, of which one entry is trained: docs/slurm.md")
    parser.add_argument("--task", type=int, help="which entry, from 0 (default: the number of the Slurm array's task)")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; not needed")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the file's")
    args = parser.parse_intermixed_args(argv)
    try:
        with StopRequest() as stop_request:  # at once: it takes minutes until the model is read
            return run(load_task(args.config, args.settings, args.sweep, args.task), stop_request)
    except (ConfigError, DataError, CheckpointError) as error:
        write_outcome("refused")
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


def run(config: Config, stop_request: StopRequest) -> int:
    # Imported late: torch and DeepSpeed take seconds, and a mistyped key should be told at once.
    from cogvlm_ft.build import build_run
    from cogvlm_ft.planning.out_of_memory import memory_errors_explained
    from cogvlm_ft.planning.preflight import check_fits
    from cogvlm_ft.runtime.distributed import any_rank, init_distributed, is_main, rank, shut_down
    from cogvlm_ft.runtime.watchdog import watched
    from cogvlm_ft.train.loop import train

    init_distributed(config.train.hang_timeout_s)
    level = logging.INFO if is_main() else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    check_fits(config)
    with watched(Path(config.output_dir), rank(), config.train.hang_timeout_s), memory_errors_explained(config):
        training = build_run(config)
        state = train(training, stop_request)
        is_stopped = any_rank(stop_request.seen) and state.step < training.num_steps
    if is_main():
        write_outcome("stopped" if is_stopped else "finished")
        output_dir = Path(training.output_dir)
        print(f"\nstopped at step {state.step} of {training.num_steps}; everything is in {output_dir}/")
        print("  report.html   checkpoints/   metrics.jsonl   evaluations/*/{predictions.jsonl,pictures/}   wandb/")
    shut_down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
