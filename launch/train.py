"""Fine-tune CogVLM.

Start it with deepspeed, torchrun, srun or python. All settings are described in docs/config.md. Exit codes: 0 finished,
or stopped and saved; 2 a setting, the data or a checkpoint cannot be used; 1 any other error.

Examples:
  deepspeed launch/train.py --config grounding_490 model.path=models/cogvlm-grounding-generalist \\
      data.shards=shards_out output_dir=runs/grounding
  deepspeed launch/train.py --config grounding_490 --sweep sweep.yaml --task 0 \\
      model.path=models/cogvlm-grounding-generalist data.shards=shards_out output_dir=runs/sweep
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

try:
    from cogvlm_ft.command_line import USER_ERROR_EXIT_CODE, add_settings, build_parser, exit_code, fast_imports
    from cogvlm_ft.jobs.sweep import load_task
    from cogvlm_ft.rehearsal.stand_in import with_model
    from cogvlm_ft.run_folder import RunFolder
    from cogvlm_ft.runtime.outcome import write_outcome
    from cogvlm_ft.runtime.stop_signals import StopRequest, StopRequested, ignore_stop_signals
    from cogvlm_ft.settings import Config
    from cogvlm_ft.terminal import check_encoding, outlive_terminal, say, start_logging
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument(
        "--sweep", type=Path, help="YAML list of settings, of which one entry is trained: docs/slurm.md"
    )
    parser.add_argument("--task", type=int, help="number of the entry, from 0 (default: SLURM_ARRAY_TASK_ID)")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; ignored")
    add_settings(parser)
    args = parser.parse_intermixed_args(argv)
    outlive_terminal()
    with StopRequest() as stop_request:  # at once: loading the model takes minutes
        code = exit_code(
            lambda: run(with_model(load_task(args.config, args.settings, args.sweep, args.task)), stop_request),
            explain_paths=False,
        )
    if code == USER_ERROR_EXIT_CODE:
        write_outcome("refused")
    return code


def run(config: Config, stop_request: StopRequest) -> int:
    """Train until the run is finished or stopped, on all ranks. Collective."""
    check_encoding()
    # Imported late: torch and DeepSpeed take seconds, and a mistyped key should be reported at once.
    with fast_imports():
        from cogvlm_ft.data.node_indexes import indexed_once_per_node
        from cogvlm_ft.planning.out_of_memory import memory_errors_explained
        from cogvlm_ft.planning.preflight import check_fits
        from cogvlm_ft.runtime.agreement import check_agreement, comparable_settings
        from cogvlm_ft.runtime.distributed import (
            any_rank,
            init_distributed,
            is_main,
            leave_hangs_to_watchdog,
            rank,
            shut_down,
        )
        from cogvlm_ft.runtime.owned_folder import owned_run_folder
        from cogvlm_ft.runtime.watchdog import watched
        from cogvlm_ft.tracking.tensorboard_log import check_tensorboard
        from cogvlm_ft.train.loop import train
        from cogvlm_ft.train.start import FinishedRun, build_checked_run

    init_distributed()
    level = logging.INFO if is_main() else logging.WARNING
    start_logging(level)
    if config.tracking.tensorboard:
        check_tensorboard()
    check_agreement(comparable_settings(config))
    splits = (config.data.train_split, config.data.val_split)
    with indexed_once_per_node(config, splits):
        check_fits(config)
        folder = config.output_path
        with (
            owned_run_folder(folder),
            watched(folder, rank(), config.train.hang_timeout_s),
            memory_errors_explained(config),
        ):
            leave_hangs_to_watchdog()
            try:
                training = build_checked_run(config, stop_request)
                if isinstance(training, FinishedRun):
                    state, last_step, is_stopped = training.state, training.last_step, False
                else:
                    state = train(training, stop_request)
                    last_step = training.last_step(state)
                    is_stopped = any_rank(stop_request.seen) and not training.is_finished(state)
                end = ending(state.step, last_step, is_stopped)
            except StopRequested:
                is_stopped, end = True, "stopped before the weights were loaded: the same command starts it again"
    if is_main():
        write_outcome("stopped" if is_stopped else "finished")
        say(f"\n{end}; everything is in {folder}/")
        others = [f"{path.name}/" for path in (RunFolder(folder).wandb, RunFolder(folder).tensorboard) if path.exists()]
        evaluations = "evaluations/*/{predictions.jsonl,pictures/}"
        say("  " + "   ".join(["report.html", "checkpoints/", "metrics.jsonl", evaluations, *others]))
    shut_down()
    return 0


def ending(step: int, last_step: int, is_stopped: bool) -> str:
    """Describe how the run ended."""
    end = "finished: raise train.epochs or train.max_steps to continue"
    end = "finished early: no better evaluation in train.patience evaluations" if step < last_step else end
    end = "stopped: the same command resumes" if is_stopped else end
    return f"{end}. Step {step} of {last_step}"


if __name__ == "__main__":
    code = main()
    ignore_stop_signals()  # everything is done: one that arrives while the program exits must not make it a failure
    sys.exit(code)
