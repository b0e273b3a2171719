"""Evaluate a model folder or a checkpoint on a split: metrics.json, predictions.jsonl, drawn images, a report.

With the config.yaml of a run, the best checkpoint of the run is evaluated. To evaluate another model, use --checkpoint,
give model.path=FOLDER on the command line, or use --untouched for the model before training.
evaluate.max_samples=null evaluates the whole split. Any number of ranks can be used; the weights need 2 (bf16) or 4
bytes per parameter. To measure the effect of an export in bf16, evaluate the exported folder (model.path=exported
train.precision=bf16) and compare with its checkpoint.

Examples:
  deepspeed launch/evaluate.py --config runs/grounding/config.yaml --out scores evaluate.max_samples=null
  python launch/evaluate.py --config runs/grounding/config.yaml --out scores_start --untouched --split val
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

try:
    from cogvlm_ft.command_line import add_settings, build_parser, exit_code, fast_imports
    from cogvlm_ft.config import load_config
    from cogvlm_ft.errors import ConfigError
    from cogvlm_ft.rehearsal.stand_in import with_model
    from cogvlm_ft.settings import PROTOCOLS, Config
    from cogvlm_ft.terminal import check_encoding, say
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, help="a step-* folder of a run, or a run (default: the best one)")
    parser.add_argument(
        "--untouched", action="store_true", help="evaluate model.path, even with the config.yaml of a run"
    )
    parser.add_argument("--split", help="default: data.val_split")
    parser.add_argument(
        "--protocol", choices=PROTOCOLS, help="how answers are read and scored (default: evaluate.protocol)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--weights", choices=("bf16", "int8", "int4"), help="as in launch/predict.py, on one GPU")
    parser.add_argument(
        "--devices",
        type=int,
        default=1,
        help="number of GPUs over which the layers are split, in one process (default: 1)",
    )
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; ignored")
    add_settings(parser, required=True)
    args = parser.parse_intermixed_args(argv)
    chosen = [f"evaluate.protocol={args.protocol}"] if args.protocol else []
    chosen += ["train.precision=bf16"] if args.weights else []
    return exit_code(lambda: run(with_model(load_config(args.config, [*args.settings, *chosen])), args))


def run(config: Config, args: argparse.Namespace) -> None:
    """Score the split on all ranks and write the results. Collective."""
    check_encoding()
    with fast_imports():
        from cogvlm_ft.build import build_scored_model
        from cogvlm_ft.checkpoints.choice import chosen_boxes, trained_wording
        from cogvlm_ft.data.node_indexes import indexed_once_per_node
        from cogvlm_ft.data.reader import open_split
        from cogvlm_ft.evaluate.coco import RESULTS_FILE, TRUTH_FILE, save_coco
        from cogvlm_ft.evaluate.evaluate import evaluate, save_evaluation
        from cogvlm_ft.evaluate.output import prepare_output
        from cogvlm_ft.evaluate.probe import run_probe
        from cogvlm_ft.grounding.wording import load_wording
        from cogvlm_ft.model.fingerprint import fingerprint
        from cogvlm_ft.planning.preflight import check_scoring
        from cogvlm_ft.report.report import try_report
        from cogvlm_ft.runtime.agreement import check_agreement, comparable_settings
        from cogvlm_ft.runtime.distributed import (
            computed_by_main,
            init_distributed,
            is_main,
            shared_errors,
            shut_down,
        )
        from cogvlm_ft.tracking.provenance import without_passwords

    init_distributed()
    prepare_output(args.out)
    data = config.data
    split = args.split or data.val_split
    with indexed_once_per_node(config, [split]):
        with shared_errors():
            weights = choose_weights(config, args)
            reader = open_split(config, split)
            trained = None if "data.wording" in typed_keys(args) else trained_wording(weights)
            wording = trained or load_wording(data.wording)
        read = {f"split {split}": reader.index.data_sha256, "--checkpoint": str(weights)}
        check_agreement(comparable_settings(config) | read)
        quantized = None if args.weights == "bf16" else args.weights
        check_scoring(config, weights, split, quantized, args.devices)
    if is_main():
        shards = data.val_shards if split == data.val_split and data.val_shards is not None else data.shards
        say(f"scoring {weights} on split {split} of {without_passwords(shards)}, wording {wording.name}", flush=True)
    model, tokenizer = build_scored_model(config, weights, quantized, args.devices)
    about = {"checkpoint": str(weights), "checkpoint_sha256": computed_by_main(lambda: fingerprint(weights))}
    kept = computed_by_main(lambda: chosen_boxes(weights))
    result = evaluate(
        model, tokenizer, reader, wording, config.evaluate, seed=config.seed, about=about, tiles=data.tiles, kept=kept
    )
    result.metrics.update(run_probe(config, model, tokenizer, args.out))
    writes = is_main()
    shut_down()  # before files are written: no rank waits for one that cannot write
    if writes:
        save_evaluation(result, args.out)
        save_coco(result.predictions, args.out)
        try_report(args.out, reader)
        say(json.dumps({key: value for key, value in result.metrics.items() if "/" not in key}, indent=2))
        files = "report.html, metrics.json (by size, language, ... too), curves.json, predictions.jsonl, pictures/"
        say(f"in {args.out}/: {files}, {TRUTH_FILE}, {RESULTS_FILE}")


def choose_weights(config: Config, args: argparse.Namespace) -> Path:
    """Return the checkpoint or the model folder to score."""
    from cogvlm_ft.checkpoints.choice import best_checkpoint, find_weights, is_run
    from cogvlm_ft.run_folder import RunFolder

    if args.checkpoint is not None:
        if args.untouched:
            raise ConfigError("--checkpoint, --untouched: found both; expected one of them. Omit one of them")
        return find_weights(args.checkpoint, "--checkpoint")
    if not args.untouched and "model.path" not in typed_keys(args):
        own = Path(args.config).expanduser()  # of a run that was moved, or seen from another folder
        folders = [own.parent] if own.is_file() and own == RunFolder(own.parent).config else []
        for folder in (*folders, config.output_path):
            if is_run(folder):
                return best_checkpoint(folder)
    return config.model.folder


def typed_keys(args: argparse.Namespace) -> set[str]:
    """Return the settings that were given on the command line."""
    return {setting.partition("=")[0] for setting in args.settings}


if __name__ == "__main__":
    sys.exit(main())
