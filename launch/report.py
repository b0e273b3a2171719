"""Write the page of a finished run, or of one evaluation, again: report.html, to be opened in any browser.

    python launch/report.py runs/grounding [--step 1000] [data.shards=shards_out]
    python launch/report.py scores --config runs/grounding/config.yaml

A training writes it by itself after every evaluation. Photos come from the shards that config.yaml names; where these
are elsewhere now, say so; without them the page has the photos that the evaluations kept.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cogvlm_ft.config import Config, load_config
from cogvlm_ft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from cogvlm_ft.data.reader import ShardReader


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output_dir of a training, or the --out of an evaluation")
    parser.add_argument("--step", type=int, help="which evaluation of the training (default: the last one)")
    parser.add_argument(
        "--config", type=Path, help="settings that name the shards (default: config.yaml in the folder)"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the file's")
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        print(run(args))
    except (ConfigError, DataError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> Path:
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
    """Open a split; None, with a warning, if the shards are not there any more."""
    from cogvlm_ft.data.reader import open_split

    if config is None:
        return None
    try:
        return open_split(config, getattr(config.data, split))
    except DataError as error:
        logging.getLogger(__name__).warning("without photos of data.%s: %s", split, error)
        return None


if __name__ == "__main__":
    sys.exit(main())
