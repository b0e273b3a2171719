"""Stop a training run after its current step: it saves and ends; the same command resumes it later.

Finds the run by the lock in its output_dir, and waits for its end. Use it on the machine of rank 0; for jobs of
slurm/train.sbatch, wherever scancel works; for runs of launch/submit.py --hostfile, wherever output_dir is mounted.

Examples:
  python launch/stop.py runs/grounding
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    from cogvlm_ft.command_line import build_parser, exit_code
    from cogvlm_ft.terminal import say
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument("run", type=Path, help="output_dir of the run")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args.run))


def run(folder: Path) -> None:
    from cogvlm_ft.jobs.stop import ask_to_stop, find_owner, wait_for_end

    owner = find_owner(folder)
    how = ask_to_stop(folder, owner)
    say(f"asked {owner} to stop: {how}. It saves after the current step; waiting for its end", flush=True)
    say(wait_for_end(folder, owner))


if __name__ == "__main__":
    sys.exit(main())
