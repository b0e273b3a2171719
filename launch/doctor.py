"""Look at everything that a training needs, before it is started: one line each, green, yellow or red.

    python launch/doctor.py --config configs/grounding_490.yaml model.path=... data.shards=... [key=value ...]
    deepspeed launch/doctor.py --config ...        on all ranks (also torchrun, srun): what they say to each other, too

Takes the settings of launch/train.py. Exits with 0 if nothing is red, 1 if something is, 2 if the settings are wrong.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys

from cogvlm_ft.config import Config, load_config
from cogvlm_ft.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file of settings")
    parser.add_argument("--all-shards", action="store_true", help="read every sample and every byte, not some samples")
    parser.add_argument("--fix", action="store_true", help="remove build locks that nobody holds")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; not needed")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the file's")
    args = parser.parse_intermixed_args(argv)
    try:
        config = load_config(args.config, args.settings)
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return 2
    try:
        return run(config, all_shards=args.all_shards, fix=args.fix)
    except Exception as error:  # before the first check: libraries that do not load, ranks that do not meet
        print(f"red     start: {type(error).__name__}: {error}")
        print("        wanted: torch and DeepSpeed loaded, a GPU for every rank, and all ranks together")
        print("        do: pip install -c constraints.txt -e . , or what docs/troubleshooting.md says about starting")
        return 1


def run(config: Config, *, all_shards: bool, fix: bool) -> int:
    num_ranks = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))
    if num_ranks != "1" and os.environ.get("RANK", os.environ.get("SLURM_PROCID")) == "0":
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        print(f"        waiting for {num_ranks} ranks to meet at {place}", flush=True)
    from cogvlm_ft.doctor.checks import CHECKS
    from cogvlm_ft.doctor.examination import begin, examine
    from cogvlm_ft.doctor.storage import remove_probes
    from cogvlm_ft.runtime.bandwidth import SideChannel
    from cogvlm_ft.runtime.distributed import init_distributed, is_main, shut_down

    logging.basicConfig(level=logging.ERROR)
    init_distributed()
    channel = SideChannel()
    examination = begin(config, channel, all_shards=all_shards, fix=fix)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what it wrote goes with it
    try:
        num_red = examine(examination, channel, CHECKS)
    finally:
        remove_probes(examination)
    if is_main():
        print(f"\n{f'{num_red} red' if num_red else 'nothing red: go'}")
    shut_down()
    return 1 if num_red else 0


if __name__ == "__main__":
    sys.exit(main())
