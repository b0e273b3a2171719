"""Fine-tune CogVLM.

    deepspeed launch/train.py --config configs/grounding_490.yaml model.path=... data.shards=... [key=value ...]

Runs the same under deepspeed, torchrun, srun and plain python. Every key is described in cogvlm_ft/config.py.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from cogvlm_ft.config import Config, load_config
from cogvlm_ft.errors import CheckpointError, ConfigError, DataError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file of settings")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; not needed")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the file's")
    args = parser.parse_intermixed_args(argv)
    try:
        config = load_config(args.config, args.settings)
        return run(config)
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


def run(config: Config) -> int:
    # Imported late: torch and DeepSpeed take seconds, and a mistyped key should be told at once.
    from cogvlm_ft.runtime.distributed import init_distributed, is_main, shut_down
    from cogvlm_ft.runtime.preemption import StopRequest
    from cogvlm_ft.train.build import build_run
    from cogvlm_ft.train.loop import train
    from cogvlm_ft.train.preflight import check_fits

    init_distributed()
    level = logging.INFO if is_main() else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    check_fits(config)
    with StopRequest() as stop_request:  # before the model is read: that takes minutes
        training = build_run(config)
        state = train(training, stop_request)
    if is_main():
        output_dir = Path(training.output_dir)
        print(f"\nstopped at step {state.step} of {training.num_steps}; everything is in {output_dir}/")
        print("  report.html   checkpoints/   metrics.jsonl   evaluations/*/{predictions.jsonl,pictures/}   wandb/")
    shut_down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
