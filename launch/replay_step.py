"""Run the samples of a skipped step again, one by one, and report which are not finite.

Runs in one process, with the settings of the run and its newest checkpoint before that step. Needs memory for the whole
model: 4 bytes per parameter, or 2 with train.precision=bf16. The images are saved in --out as the model sees them.

Examples:
  python launch/replay_step.py runs/grounding/nonfinite/step-00000120.json
  python launch/replay_step.py runs/grounding/nonfinite/step-00000120.json --model exported --out replayed
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
    parser.add_argument("file", type=Path, help="nonfinite/step-XXXXXXXX.json of a run")
    parser.add_argument("--model", type=Path, help="model folder or checkpoint to use instead of the run's")
    parser.add_argument("--out", type=Path, help="folder for the images (default: FILE without .json)")
    args = parser.parse_args(argv)
    start_logging(logging.INFO)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Print one paragraph per sample, then how many are not finite."""
    with fast_imports():
        from cogvlm_ft.train.replay_step import open_replay

    replay = open_replay(args.file, args.model, args.out)
    say(f"step {replay.step.step} with {replay.weights}")
    num_broken = 0
    for found in replay.run():
        num_broken += not found.is_finite
        verdict = "finite" if found.is_finite else "NOT FINITE"
        say(
            f"\n{found.key} (rank {found.row.rank}): {verdict}, loss {found.loss:.4g} per token, gradient norm "
            f"{found.grad_norm:.4g}; in training the loss of its {found.row.tokens} tokens was {found.row.loss}"
        )
        for prompt, answer in found.turns:
            say(f"  {prompt!r} -> {answer!r}")
        say(f"  {found.picture}")
    say(f"\n{num_broken} of {len(replay.step.rows)} samples are not finite by themselves")


if __name__ == "__main__":
    sys.exit(main())
