"""Queue a training under Slurm: settings checked, memory foretold, then sbatch on slurm/train.sbatch.

    python launch/submit.py --config configs/grounding_490.yaml --nodes 2 model.path=... data.shards=... output_dir=...

What your cluster is stands in slurm/cluster.yaml, or in the options below. It prints the sbatch commands, which you may
as well type yourself; with --dry-run it only prints them. docs/slurm.md has the rest.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from cogvlm_ft.config import load_config
from cogvlm_ft.errors import CheckpointError, ConfigError, DataError
from cogvlm_ft.jobs.sweep import load_entry, read_sweep


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file of settings")
    parser.add_argument("--cluster", type=Path, default=Path("slurm/cluster.yaml"), help="YAML file of your cluster")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--qos")
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--gpus-per-node", type=int)
    parser.add_argument("--time", help="of one job, as sbatch takes it")
    parser.add_argument("--chain", type=int, default=1, help="jobs, each of which goes on where the one before ended")
    parser.add_argument("--after", action="store_true", help="then score the best checkpoint and export it")
    parser.add_argument("--sweep", type=Path, help="YAML of overrides: an array of jobs, one for each entry")
    parser.add_argument("--dry-run", action="store_true", help="submit nothing")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the file's")
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        run(args)
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # a login node has no GPU, and DeepSpeed warns where it finds none
    config = load_config(args.config, args.settings)
    entries = None if args.sweep is None else read_sweep(args.sweep)
    if args.chain < 1 or (entries and args.chain > 1):
        raise ConfigError(f"--chain {args.chain}: wanted 1 or more, and 1 for a sweep, whose jobs go on by themselves")
    from cogvlm_ft.jobs.submit import Submission, check_plan, load_cluster, submit

    names = ("partition", "account", "qos", "nodes", "gpus_per_node", "time")
    cluster = load_cluster(args.cluster, {name: getattr(args, name) for name in names})
    configs = [load_entry(args.config, args.settings, entry) for entry in entries] if entries else [config]
    for summary in dict.fromkeys(check_plan(one, cluster) for one in configs):
        print(summary)
    arguments = ["--config", args.config] if args.config else []
    arguments += ["--sweep", str(args.sweep)] if args.sweep else []
    submission = Submission(
        cluster=cluster,
        arguments=[*arguments, *args.settings],
        output_dir=config.output_dir,
        sweep=args.sweep,
        num_tasks=len(entries) if entries else None,
        chain=args.chain,
        after=args.after,
    )
    for command in submit(submission, dry_run=args.dry_run):
        print(command)


if __name__ == "__main__":
    sys.exit(main())
