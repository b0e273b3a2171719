"""Evaluate blends of a fine-tuned model with its start model, and recommend the best one that forgets little.

Blends of 0, 0.2, ..., 1 are evaluated on the validation images and on the questions of evaluate.probe. The recommended
blend has the best train.monitor of those that keep --keep of the start model's probe score (chrF); write it with
launch/export.py --blend. Scores are saved in blends.json of the run folder, and shown as a curve in its report.

Every rank needs memory for the whole model in train.precision. The weights of both models are kept in host memory if
they fit.

Examples:
  python launch/blend.py --config runs/grounding/config.yaml evaluate.probe=probe.jsonl
  deepspeed launch/blend.py --config runs/grounding/config.yaml --keep 0.95 evaluate.probe=probe.jsonl
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from cogvlm_ft.command_line import add_settings, build_parser, exit_code, fast_imports, paste
    from cogvlm_ft.config import load_config
    from cogvlm_ft.rehearsal.stand_in import with_model
    from cogvlm_ft.settings import Config
    from cogvlm_ft.terminal import check_encoding, say
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

if TYPE_CHECKING:
    from cogvlm_ft.export.blend_scores import BlendScore


def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, help="a step-* folder, or a run (default: the best one of the run)")
    parser.add_argument("--start", type=Path, help="model folder that training started from (default: model.path)")
    parser.add_argument(
        "--keep",
        type=float,
        default=0.98,
        metavar="F",
        help="minimum fraction of the start model's probe score; 0: no limit",
    )
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; ignored")
    add_settings(parser, required=True)
    args = parser.parse_intermixed_args(argv)
    if not 0 <= args.keep <= 1:
        parser.error(f"--keep {args.keep:g}: expected 0 to 1, such as 0.98")
    return exit_code(lambda: run(with_model(load_config(args.config, args.settings)), args))


def run(config: Config, args: argparse.Namespace) -> None:
    """Score the blends on all ranks, and report them. Collective."""
    check_encoding()
    with fast_imports():
        from cogvlm_ft.checkpoints.choice import best_checkpoint, find_weights, trained_wording
        from cogvlm_ft.data.reader import open_split
        from cogvlm_ft.evaluate.results import find_evaluation
        from cogvlm_ft.export.blend_scores import check_probe, save_blends, score_blends
        from cogvlm_ft.grounding.wording import load_wording
        from cogvlm_ft.planning.preflight import check_scoring
        from cogvlm_ft.report.report import try_report
        from cogvlm_ft.run_folder import RunFolder
        from cogvlm_ft.runtime.distributed import init_distributed, is_main, shut_down

    init_distributed()
    check_probe(config, args.keep)
    found = find_weights(args.checkpoint, "--checkpoint") if args.checkpoint else best_checkpoint(config.output_path)
    start, reader = args.start or config.model.folder, open_split(config, config.data.val_split)
    check_scoring(config, found, config.data.val_split)
    wording = trained_wording(found) or load_wording(config.data.wording)
    scores = score_blends(config, found, start, reader, wording)
    writes = is_main()
    shut_down()  # before files are written: no rank waits for one that cannot write
    if not writes:
        return
    folder = RunFolder(config.output_path)
    save_blends(scores, folder.blends)
    if folder.evaluations.is_dir():
        train_reader = open_split(config, config.data.train_split)
        try_report(find_evaluation(folder.path), reader, run_folder=folder.path, train_reader=train_reader)
    show(scores, config, args.keep, found, start)
    say(f"scores in {folder.blends}, curve in {folder.report}")


def show(scores: list[BlendScore], config: Config, keep: float, checkpoint: Path, start: Path) -> None:
    """Print one line per blend, and the best."""
    from cogvlm_ft.evaluate.monitor import monitor_name, monitor_value
    from cogvlm_ft.export.blend_scores import PROBE, best_blend

    name = monitor_name(config.train.monitor)
    for score in scores:
        value, probe = monitor_value(score.metrics, config.train.monitor), score.metrics.get(PROBE)
        shown = "" if probe is None else f"  {PROBE} {probe:.1f}"
        say(f"blend {score.fraction:.1f}  {name} {'none' if value is None else f'{value:.3f}'}{shown}")
    best = best_blend(scores, config.train.monitor, keep)
    limit = f" of those that keep {keep:g} of the start's probe score" if keep else ""
    say(f"\nbest{limit}: blend {best.fraction:.1f}")
    if best.fraction > 0:
        options = ("--checkpoint", checkpoint, "--out", "blended", "--blend", f"{best.fraction:.1f}", "--start", start)
        say(f"  {paste('export', *options)}")


if __name__ == "__main__":
    sys.exit(main())
