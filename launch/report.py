"""Write report.html of a run, or of one evaluation, again.

A training run writes it automatically after every evaluation. Images are read from the shards in config.yaml; if these
were moved, or are on a server, give data.shards=... here. Without shards, the page shows the images that the
evaluations saved.

Examples:
  python launch/report.py runs/grounding
  python launch/report.py runs/grounding --step 1000 data.shards=shards_out
  python launch/report.py scores --config runs/grounding/config.yaml
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from cogvlm_ft.command_line import build_parser, exit_code, fast_imports
    from cogvlm_ft.config import load_config, load_run_config
    from cogvlm_ft.errors import ConfigError, DataError
    from cogvlm_ft.settings import Config
    from cogvlm_ft.terminal import say, start_logging
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

if TYPE_CHECKING:
    from cogvlm_ft.data.reader import ShardReader


def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument("folder", type=Path, help="output_dir of a training run, or the --out of an evaluation")
    parser.add_argument("--step", type=int, help="evaluation of the run, by its step (default: the last one)")
    parser.add_argument("--config", type=Path, help="config with the shards (default: config.yaml in the folder)")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that override those of --config")
    args = parser.parse_intermixed_args(argv)
    start_logging(logging.INFO)
    return exit_code(lambda: say(run(args)))


def run(args: argparse.Namespace) -> Path:
    """Write the page and return its path."""
    with fast_imports():
        from cogvlm_ft.evaluate.results import find_evaluation
        from cogvlm_ft.report.report import write_report

    evaluation = find_evaluation(args.folder, args.step)
    config = settings_of_report(args)
    return write_report(
        evaluation,
        open_reader(config, "val_split", args.settings),
        run_folder=None if evaluation == args.folder else args.folder,
        train_reader=open_reader(config, "train_split", args.settings),
    )


def settings_of_report(args: argparse.Namespace) -> Config | None:
    """Load the settings that name the shards; None if there are none. A run folder may be somebody else's."""
    from cogvlm_ft.run_folder import RunFolder, is_in_run_folder

    path = args.config or RunFolder(args.folder).config
    if args.config is not None and not is_in_run_folder(args.config):
        return load_config(path, args.settings)
    if not path.is_file():
        if args.config is None:
            return None
        raise ConfigError(f"--config {path}: no such file")
    return load_run_config(path, args.settings)


def open_reader(config: Config | None, split: str, typed: list[str]) -> ShardReader | None:
    """Open a split; return None, with a warning, if its shards do not exist any more.

    Addresses and a folder for copies come from the command line alone: to open an address is to call its server.
    """
    from cogvlm_ft.data.reader import open_split

    if config is None:
        return None
    data = config.data
    name = "val_shards" if split == "val_split" and data.val_shards is not None else "shards"
    is_typed = any(setting.startswith(f"data.{name}=") for setting in typed)
    try:
        if not is_typed and (address := address_in(getattr(data, name))):
            raise DataError(f"{address}: found an address; type data.{name}=... here to open it")
        if not any(setting.startswith("data.cache_dir=") for setting in typed):
            config = replace(config, data=replace(data, cache_dir=None))
        return open_split(config, getattr(data, split))
    except DataError as error:
        logging.getLogger(__name__).warning("data.%s: %s; the report has no images of it", split, error)
        return None


def address_in(shards: Any) -> str | None:
    """Return what in a value of data.shards is, or may become, the address of a server; None if nothing is."""
    from cogvlm_ft.data.addresses import shown

    if isinstance(shards, (list, dict)):
        parts = shards.values() if isinstance(shards, dict) else shards
        return next((found for part in parts if (found := address_in(part))), None)
    if not isinstance(shards, str):
        return None
    parts = [part for part in shards.split("::") if not Path(part).expanduser().exists()]
    return next((shown(part) for part in parts if ":" in part), None)  # braces may hide what is around a colon


if __name__ == "__main__":
    sys.exit(main())
