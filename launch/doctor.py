"""Check everything a training run needs before it is started, and print one line per check: green, yellow or red.

Accepts the settings of launch/train.py. With a launcher (deepspeed, torchrun, srun), it also checks the connections
between all ranks. Exit codes: 0 no line is red, 1 a line is red, 2 the settings are wrong.

Examples:
  python launch/doctor.py --config grounding_490 model.path=MODEL data.shards=shards_out output_dir=runs/grounding
  deepspeed launch/doctor.py --config grounding_490 model.path=MODEL data.shards=shards_out output_dir=runs/grounding
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys

try:
    from cogvlm_ft.command_line import add_settings, build_parser, exit_code, fast_imports
    from cogvlm_ft.config import load_config
    from cogvlm_ft.errors import ConfigError
    from cogvlm_ft.rehearsal.stand_in import with_model
    from cogvlm_ft.settings import Config
    from cogvlm_ft.terminal import check_encoding, say, start_logging
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument(
        "--all-shards", action="store_true", help="read all samples and verify all files, instead of a few samples"
    )
    parser.add_argument("--fix", action="store_true", help="remove build locks that no process holds")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; ignored")
    add_settings(parser)
    args = parser.parse_intermixed_args(argv)
    return exit_code(lambda: examine_settings(args))


def examine_settings(args: argparse.Namespace) -> int:
    """Load the settings and run the checks; report as red what fails before the first check."""
    config = with_model(load_config(args.config, args.settings))
    try:
        check_encoding()
    except ConfigError as error:
        say(f"red     {error}")
        return 1
    try:
        return run(config, all_shards=args.all_shards, fix=args.fix)
    except Exception as error:  # libraries that do not load, ranks that do not connect
        say(f"red     start: {type(error).__name__}: {error}")
        say("        expected: torch and DeepSpeed load, every rank has a GPU, and all ranks connect")
        say("        do: pip install -c constraints.txt -e . , or see docs/troubleshooting.md about starting")
        return 1


def run(config: Config, *, all_shards: bool, fix: bool) -> int:
    """Run the checks on all ranks and return the exit code. Collective."""
    num_ranks = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))
    if num_ranks != "1" and os.environ.get("RANK", os.environ.get("SLURM_PROCID")) == "0":
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        say(f"        waiting for {num_ranks} ranks to connect at {place}", flush=True)
    with fast_imports():
        from cogvlm_ft.doctor.checks import CHECKS
        from cogvlm_ft.doctor.examination import begin, examine
        from cogvlm_ft.doctor.storage import remove_probes
        from cogvlm_ft.runtime.bandwidth import SideChannel
        from cogvlm_ft.runtime.distributed import init_distributed, is_main, shut_down

    start_logging(logging.ERROR)
    init_distributed()
    channel = SideChannel()
    examination = begin(config, channel, all_shards=all_shards, fix=fix)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that its probe files are removed
    try:
        num_red = examine(examination, channel, CHECKS)
    finally:
        remove_probes(examination)
    if is_main():
        say(f"\n{f'{num_red} red' if num_red else 'nothing red: ready to start'}")
    shut_down()
    return 1 if num_red else 0


if __name__ == "__main__":
    sys.exit(main())
