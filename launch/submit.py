"""Check the settings, estimate the memory, and submit a training run to Slurm, or start it on the nodes of a hostfile.

Describe your cluster in slurm/cluster.yaml; options override it. The sbatch commands are printed before they are run;
--dry-run only prints them. --hostfile starts the run immediately, over pdsh and ssh, with this shell's environment on
all nodes. See docs/slurm.md.

Examples:
  python launch/submit.py --config grounding_490 --nodes 2 --dry-run \\
      model.path=models/cogvlm-grounding-generalist data.shards=shards_out output_dir=runs/grounding
  sbatch --nodes=2 "$(python launch/submit.py --print-script train)" --config grounding_490 \\
      model.path=models/cogvlm-grounding-generalist data.shards=shards_out output_dir=runs/grounding
  python launch/submit.py --hostfile hostfile --config grounding_490 \\
      model.path=models/cogvlm-grounding-generalist data.shards=shards_out output_dir=runs/grounding
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from pathlib import Path

try:
    from cogvlm_ft.command_line import add_settings, build_parser, exit_code, fast_imports
    from cogvlm_ft.config import find_preset, load_config
    from cogvlm_ft.errors import ConfigError
    from cogvlm_ft.jobs.sweep import load_entry, read_sweep
    from cogvlm_ft.rehearsal.stand_in import with_model
    from cogvlm_ft.settings import Config
    from cogvlm_ft.terminal import plain_text, say, start_logging
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

PASSWORD_ADVICE = (
    "Passwords and queries of addresses are left out above. Keep them out of commands, which others can list: in "
    "~/.netrc on every node, or in the environment, as 'data.shards=https://${oc.env:LOGIN}@host/shards'"
)
OF_SLURM = ("partition", "account", "qos", "nodes", "gpus_per_node", "time", "sweep", "after")
SCRIPTS = ("train", "evaluate", "after")


def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument("--cluster", default="slurm/cluster.yaml", help="YAML file that describes your cluster")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--qos")
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--gpus-per-node", type=int)
    parser.add_argument("--time", help="limit of one job, as for sbatch")
    parser.add_argument("--chain", type=int, default=1, help="number of jobs, each of which resumes the previous one")
    parser.add_argument(
        "--after", action="store_true", help="add a job that evaluates the best checkpoint and exports it"
    )
    parser.add_argument("--sweep", type=Path, help="YAML list of settings: submit an array of jobs, one for each entry")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and submit nothing")
    parser.add_argument("--print-script", choices=SCRIPTS, help="print the path of this batch script and exit")
    parser.add_argument("--hostfile", type=Path, help="start without Slurm on these nodes: lines such as node1 slots=8")
    parser.add_argument("--master-addr", "--master_addr", help="address of the first node (default: its name)")
    parser.add_argument(
        "--master-port", "--master_port", type=int, help="free port on the first node (default: chosen automatically)"
    )
    add_settings(parser)
    args = parser.parse_intermixed_args(argv)
    start_logging(logging.WARNING, "%(levelname)s: %(message)s")
    environment = dict(os.environ)  # of the jobs: what this process sets for itself is not for them
    return exit_code(lambda: run(args, environment))


def run(args: argparse.Namespace, environment: dict[str, str]) -> int:
    """Check the settings, submit or start the run, and print the commands."""
    if args.print_script:
        from cogvlm_ft.jobs.submit import script

        say(script(args.print_script))
        return 0
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # a login node has no GPU; DeepSpeed warns if it finds none
    config = load_config(args.config, args.settings)
    entries = None if args.sweep is None else read_sweep(args.sweep)
    if args.chain < 1 or (entries and args.chain > 1):
        raise ConfigError(
            f"--chain {args.chain}: expected 1 or more, and 1 for a sweep, whose jobs resume by themselves"
        )
    with fast_imports():
        from cogvlm_ft.jobs.submit import Submission, check_plan, load_cluster, submit

    file = find_preset(args.cluster, "slurm/*.yaml", "--cluster ")
    if args.hostfile:
        return start_on_nodes(args, config, file, environment)
    cluster = load_cluster(file, {name: getattr(args, name) for name in OF_SLURM[:6]})
    configs = [load_entry(args.config, args.settings, entry) for entry in entries] if entries else [config]
    for summary in dict.fromkeys(check_plan(with_model(one), cluster) for one in configs):
        say(summary)
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
        environment=environment,
    )
    is_masked = False
    for line in submit(submission, dry_run=args.dry_run):
        say(line, flush=True)
        is_masked = is_masked or plain_text(line) != line
    if is_masked:
        say(PASSWORD_ADVICE)
    return 0


def start_on_nodes(args: argparse.Namespace, config: Config, cluster_file: Path, environment: dict[str, str]) -> int:
    """Run the training on the nodes of the hostfile, and return its exit code."""
    from cogvlm_ft.jobs.hostfile import HostfileStart, check_start, read_hostfile, run_on_nodes
    from cogvlm_ft.jobs.submit import check_plan, load_cluster
    from cogvlm_ft.runtime.ports import free_port

    given = [f"--{name.replace('_', '-')}" for name in OF_SLURM if getattr(args, name)]
    if given or args.chain > 1:
        raise ConfigError(
            f"--hostfile: found {' '.join(given) or '--chain'}; expected none of Slurm's options beside it"
        )
    nodes = read_hostfile(args.hostfile)
    sizes = {"nodes": len(nodes), "gpus_per_node": max(nodes.values())}
    say(check_plan(with_model(config), load_cluster(cluster_file, sizes)))
    start = HostfileStart(
        nodes=nodes,
        master_addr=args.master_addr or next(iter(nodes)),
        master_port=args.master_port or free_port(),
        output_dir=config.output_path,
        arguments=[*(["--config", args.config] if args.config else []), *args.settings],
        environment=environment,
    )
    if args.dry_run:
        say(shlex.join(start.command(f"{config.output_dir}/.deepspeed_env-....sh")))
        return 0
    check_start(start)
    return run_on_nodes(start)


if __name__ == "__main__":
    sys.exit(main())
