"""Run the samples of a step that training skipped once more, one by one, to see which is not finite and why.

    python launch/replay_step.py runs/grounding/nonfinite/step-00000120.json [--model FOLDER] [--out FOLDER]

On one process, with the settings of the run and its newest checkpoint before that step. The whole model is held, at 4
bytes per parameter (2 with train.precision=bf16). Pictures as the model sees them are saved in FILE without .json.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from cogvlm_ft.errors import CheckpointError, ConfigError, DataError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="nonfinite/step-XXXXXXXX.json of a run")
    parser.add_argument("--model", type=Path, help="a model folder or a checkpoint to take instead")
    parser.add_argument("--out", type=Path, help="folder for the pictures (default: FILE without .json)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")

    from cogvlm_ft.train.replay_step import open_replay

    try:
        replay = open_replay(args.file, args.model, args.out)
        print(f"step {replay.step.step} with {replay.weights}")
        num_broken = 0
        for found in replay.run():
            num_broken += not found.is_finite
            verdict = "finite" if found.is_finite else "NOT FINITE"
            print(
                f"\n{found.key} (rank {found.row.rank}): {verdict}, loss {found.loss:.4g} per token, gradient norm "
                f"{found.grad_norm:.4g}; in training the loss of its {found.row.tokens} tokens was {found.row.loss}"
            )
            for prompt, answer in found.turns:
                print(f"  {prompt!r} -> {answer!r}")
            print(f"  {found.picture}")
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(f"\n{num_broken} of {len(replay.step.rows)} samples are not finite by themselves")
    return 0


if __name__ == "__main__":
    sys.exit(main())
