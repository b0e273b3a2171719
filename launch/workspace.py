"""Lay out the panels of your Weights & Biases project: validation, training, pictures, breakdowns, speed, system.

    python launch/workspace.py --project cogvlm-grounding [--entity TEAM]
    python launch/workspace.py --print        the layout as JSON, without a network

Needs a key for W&B, a project with a run in it, and: pip install -e ".[workspace]". It adds a saved view and changes
nothing else; run it once per project.
"""

from __future__ import annotations

import argparse
import json
import sys

from cogvlm_ft.config import TrackingConfig
from cogvlm_ft.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", default=TrackingConfig().project, help="tracking.project of your runs")
    parser.add_argument("--entity", help="user or team; default: yours")
    parser.add_argument("--print", action="store_true", help="print the layout and send nothing")
    args = parser.parse_args(argv)

    from cogvlm_ft.tracking.workspace import describe_workspace, save_workspace

    try:
        if args.print:
            print(json.dumps(describe_workspace(args.project), indent=2))
        else:
            print(save_workspace(args.entity, args.project))
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
