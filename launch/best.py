"""Print the path of the best checkpoint of a training run, by train.monitor.

With --sweep, print that of one entry of a sweep: the entry given by --task, or by the task of a Slurm array.

Examples:
  python launch/best.py runs/grounding
  python launch/export.py --checkpoint "$(python launch/best.py runs/grounding)" --out exported
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from cogvlm_ft.command_line import build_parser, exit_code
    from cogvlm_ft.jobs.sweep import choose_entry
    from cogvlm_ft.terminal import say
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument("run", type=Path, help="output_dir of a training run or of a sweep")
    parser.add_argument("--sweep", type=Path, help="YAML file of the sweep")
    parser.add_argument("--task", type=int, help="number of the entry, from 0 (default: SLURM_ARRAY_TASK_ID)")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Print the path."""
    folder = args.run / choose_entry(args.sweep, args.task).name if args.sweep else args.run
    from cogvlm_ft.checkpoints.choice import best_checkpoint

    say(best_checkpoint(folder))


if __name__ == "__main__":
    sys.exit(main())
