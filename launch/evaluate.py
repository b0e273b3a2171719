"""Score a model folder or a training checkpoint on a split: metrics.json, predictions.jsonl, drawn images, a report.

Without --checkpoint it scores the model folder model.path. Any number of ranks can score a checkpoint, whatever number
wrote it. evaluate.max_samples=null scores the whole split. To measure what an export in bf16 changes, score the
exported folder (model.path=exported train.precision=bf16) and compare with the scores of its checkpoint.

Examples:
  deepspeed launch/evaluate.py --config runs/grounding/config.yaml --out scores \\
      --checkpoint runs/grounding/checkpoints/step-00000100 evaluate.max_samples=null
  python launch/evaluate.py --config runs/grounding/config.yaml --out scores_start --split val
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

try:
    from cogvlm_ft.command_line import add_settings, build_parser, exit_code
    from cogvlm_ft.config import load_config
    from cogvlm_ft.settings import PROTOCOLS, Config
    from cogvlm_ft.terminal import check_encoding, say
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, help="a step-* folder of a run")
    parser.add_argument("--split", help="default: data.val_split")
    parser.add_argument("--protocol", choices=PROTOCOLS, help="how to read and score (default: evaluate.protocol)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; ignored")
    add_settings(parser, required=True)
    args = parser.parse_intermixed_args(argv)
    protocol = [f"evaluate.protocol={args.protocol}"] if args.protocol else []
    return exit_code(lambda: run(load_config(args.config, [*args.settings, *protocol]), args))


def run(config: Config, args: argparse.Namespace) -> None:
    """Score the split on all ranks and write the results. Collective."""
    check_encoding()
    from cogvlm_ft.build import build_model_engine
    from cogvlm_ft.checkpoints.checkpoint import load_checkpoint
    from cogvlm_ft.data.reader import open_split
    from cogvlm_ft.evaluate.coco import RESULTS_FILE, TRUTH_FILE, save_coco
    from cogvlm_ft.evaluate.evaluate import evaluate, save_evaluation
    from cogvlm_ft.evaluate.fingerprint import fingerprint
    from cogvlm_ft.evaluate.probe import run_probe
    from cogvlm_ft.grounding.wording import load_wording
    from cogvlm_ft.report.report import try_report
    from cogvlm_ft.runtime.distributed import init_distributed, is_main, shut_down

    init_distributed()
    data = config.data
    split = args.split or data.val_split
    reader = open_split(config, split)
    wording = load_wording(config.data.wording)
    engine, tokenizer = build_model_engine(config)
    if args.checkpoint is not None:
        load_checkpoint(engine, args.checkpoint, with_optimizer=False)
    weights = args.checkpoint or config.model.folder
    about = {"checkpoint": str(weights), "checkpoint_sha256": fingerprint(weights)} if is_main() else None
    result = evaluate(engine.module, tokenizer, reader, wording, config.evaluate, seed=config.seed, about=about)
    result.metrics.update(run_probe(config, engine.module, tokenizer, args.out))
    if is_main():
        save_evaluation(result, args.out)
        save_coco(result.predictions, args.out)
        try_report(args.out, reader)
        say(json.dumps({key: value for key, value in result.metrics.items() if "/" not in key}, indent=2))
        files = "report.html, metrics.json (by size, language, ... too), curves.json, predictions.jsonl, pictures/"
        say(f"in {args.out}/: {files}, {TRUTH_FILE}, {RESULTS_FILE}")
    shut_down()


if __name__ == "__main__":
    sys.exit(main())
