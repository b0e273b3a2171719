"""Write report.html of a run, or of one evaluation, again.

A training run writes it by itself after every evaluation. Images come from the shards that config.yaml names; if these
were moved, give data.shards=... Without shards the page shows the images that the evaluations kept.

Examples:
  python launch/report.py runs/grounding
  python launch/report.py runs/grounding --step 1000 data.shards=shards_out
  python launch/report.py scores --config runs/grounding/config.yaml
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from cogvlm_ft.command_line import build_parser, exit_code
    from cogvlm_ft.config import load_config
    from cogvlm_ft.errors import DataError
    from cogvlm_ft.settings import Config
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

if TYPE_CHECKING:
    from cogvlm_ft.data.reader import ShardReader


def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument("folder", type=Path, help="output_dir of a training run, or the --out of an evaluation")
    parser.add_argument("--step", type=int, help="evaluation of the run, by its step (default: the last one)")
    parser.add_argument(
        "--config", type=Path, help="settings that name the shards (default: config.yaml in the folder)"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that override those of --config")
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    return exit_code(lambda: print(run(args)))


def run(args: argparse.Namespace) -> Path:
    """Write the page and return its path."""
    from cogvlm_ft.evaluate.results import find_evaluation
    from cogvlm_ft.report.report import write_report
    from cogvlm_ft.run_folder import RunFolder

    evaluation = find_evaluation(args.folder, args.step)
    path = args.config or RunFolder(args.folder).config
    config = load_config(path, args.settings) if path.is_file() or args.config else None
    return write_report(
        evaluation,
        open_reader(config, "val_split"),
        run_folder=None if evaluation == args.folder else args.folder,
        train_reader=open_reader(config, "train_split"),
    )


def open_reader(config: Config | None, split: str) -> ShardReader | None:
    """Open a split; return None, with a warning, if its shards do not exist any more."""
    from cogvlm_ft.data.reader import open_split

    if config is None:
        return None
    try:
        return open_split(config, getattr(config.data, split))
    except DataError as error:
        logging.getLogger(__name__).warning("data.%s: %s; the report has no images of it", split, error)
        return None


if __name__ == "__main__":
    sys.exit(main())
