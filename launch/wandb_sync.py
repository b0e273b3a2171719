"""Send a run to Weights & Biases after its training, from machines that had no network then.

    python launch/wandb_sync.py runs/grounding [--mode auto|online|offline] [--project P] [--entity E] [--new-run]
    python launch/wandb_sync.py runs/grounding --export exported [--alias best]

The first sends metrics.jsonl and the evaluations' pictures and predictions as one run, however many attempts the
training took. The second notes an exported model in that run: where it lies, without uploading it.
Without a key for W&B (`wandb login`, or WANDB_API_KEY) either is recorded offline in RUN/wandb.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from cogvlm_ft.errors import ConfigError, DataError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output_dir of a training")
    parser.add_argument("--mode", default="auto", help="auto (online with a key, else offline), online or offline")
    parser.add_argument("--project", help="default: that of the training")
    parser.add_argument("--entity", help="default: that of the training")
    parser.add_argument("--new-run", action="store_true", help="under a new id, if W&B holds the run already")
    parser.add_argument("--export", type=Path, help="only note this exported model folder in the run")
    parser.add_argument("--alias", default="exported", help="of the exported model in W&B")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")

    from cogvlm_ft.report.wandb_media import note_export, replay

    try:
        if args.export is not None:
            sent = note_export(args.run, args.export, args.alias, mode=args.mode)
        else:
            sent = replay(args.run, mode=args.mode, project=args.project, entity=args.entity, new_run=args.new_run)
    except (ConfigError, DataError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(sent.place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
