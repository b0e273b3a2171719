"""Print the best checkpoint of a training, by its train.monitor.

    python launch/export.py --out exported --checkpoint $(python launch/best.py runs/grounding)

With --sweep, of one entry of a sweep: that of --task, or of the Slurm array's task.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cogvlm_ft.errors import CheckpointError, ConfigError
from cogvlm_ft.jobs.sweep import choose_entry


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output_dir of a training or of a sweep")
    parser.add_argument("--sweep", type=Path, help="YAML of overrides that was trained")
    parser.add_argument("--task", type=int, help="which entry, from 0 (default: the number of the Slurm array's task)")
    args = parser.parse_args(argv)
    try:
        run = args.run / choose_entry(args.sweep, args.task).name if args.sweep else args.run
        from cogvlm_ft.jobs.submit import best_checkpoint

        print(best_checkpoint(run))
    except (ConfigError, CheckpointError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
