"""Create a saved view of a Weights & Biases project: validation, training, images, breakdowns, speed, system.

Run it once per project; it adds a saved view and changes nothing else. Needs a W&B key, a project with at least one
run, and: pip install -e ".[workspace]". --print prints the layout as JSON, without a network.

Examples:
  python launch/workspace.py --project cogvlm-grounding
  python launch/workspace.py --print
"""

from __future__ import annotations

import argparse
import json
import sys

try:
    from cogvlm_ft.command_line import build_parser, exit_code
    from cogvlm_ft.settings import TrackingConfig
    from cogvlm_ft.terminal import say
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument(
        "--project", default=TrackingConfig().project, help="tracking.project of your runs (default: cogvlm-grounding)"
    )
    parser.add_argument("--entity", help="user or team (default: yours)")
    parser.add_argument("--print", action="store_true", help="print the layout without sending anything")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Print the layout, or save it and print its address."""
    from cogvlm_ft.report.workspace import describe_workspace, save_workspace

    if args.print:
        say(json.dumps(describe_workspace(args.project), indent=2))
    else:
        say(save_workspace(args.entity, args.project))


if __name__ == "__main__":
    sys.exit(main())
