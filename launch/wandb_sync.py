"""Upload a run to Weights & Biases that was recorded offline.

Uploads metrics.jsonl and the images and predictions of the evaluations as one run, even if the run was resumed several
times. With --export, only the path of an exported model is recorded in that run; the model is not uploaded. Needs a W&B
key: `wandb login`, or WANDB_API_KEY. With --mode offline, the run is recorded in RUN/wandb instead, for `wandb sync`.

Examples:
  python launch/wandb_sync.py runs/grounding --project cogvlm-grounding
  python launch/wandb_sync.py runs/grounding --export exported --alias best
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

try:
    from cogvlm_ft.command_line import build_parser, exit_code, fast_imports
    from cogvlm_ft.terminal import say, start_logging
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument("run", type=Path, help="output_dir of a training run")
    parser.add_argument("--mode", default="auto", help="auto (online, unless WANDB_MODE is set), online or offline")
    parser.add_argument("--project", help="default: that of the training run")
    parser.add_argument("--entity", help="default: that of the training run")
    parser.add_argument("--new-run", action="store_true", help="use a new id if W&B already has the run")
    parser.add_argument("--export", type=Path, help="only record this exported model folder in the run")
    parser.add_argument("--alias", default="exported", help="alias of the exported model in W&B (default: exported)")
    args = parser.parse_args(argv)
    start_logging(logging.INFO)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Send, and print where the run is."""
    with fast_imports():
        from cogvlm_ft.report.wandb_media import note_export, replay

    if args.export is not None:
        sent = note_export(args.run, args.export, args.alias, mode=args.mode)
    else:
        sent = replay(args.run, mode=args.mode, project=args.project, entity=args.entity, new_run=args.new_run)
    say(sent.place)


if __name__ == "__main__":
    sys.exit(main())
