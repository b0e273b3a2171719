"""Export a training checkpoint as a model folder: safetensors with the published names, config, tokenizer, model card.

Runs on a CPU, one tensor at a time, also during training. The exported folder is read back, and every weight is
compared with the checkpoint bit for bit. To measure the effect of bf16 on the answers, use launch/evaluate.py.
Exit codes: 0 exported, 1 a weight differs (nothing is written to --out), 2 it could not be exported.

Examples:
  python launch/export.py --checkpoint runs/grounding/checkpoints/step-00000100 --out exported --dtype bf16
  python launch/export.py --checkpoint adapter --base models/cogvlm --out merged --dtype bf16
  python launch/export.py --checkpoint runs/grounding --out blended --blend 0.6 --start models/cogvlm
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

try:
    from cogvlm_ft.command_line import build_parser, exit_code, fast_imports, paste
    from cogvlm_ft.terminal import say, start_logging
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a step-* folder, or a run (its best checkpoint)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--prove", type=int, metavar="N", help="0 skips the comparison of the weights")
    parser.add_argument("--adapter", action="store_true", help="write only the adapters, in peft's format")
    parser.add_argument(
        "--weights-of", choices=("trained", "ema"), default="trained", help="ema: the running averages of train.ema"
    )
    parser.add_argument("--base", type=Path, help="base model folder, if --checkpoint is an adapter of peft")
    parser.add_argument(
        "--weights", choices=("int8", "int4"), help="write quantised linear layers, for this package (docs/serving.md)"
    )
    parser.add_argument("--blend", type=float, metavar="F", help="write F x checkpoint + (1 - F) x --start")
    parser.add_argument("--start", type=Path, help="with --blend: the model folder that training started from")
    args = parser.parse_args(argv)
    if args.adapter and args.blend is not None:
        parser.error("found --adapter and --blend; expected one of them: a blend is of whole models")
    if args.weights and (args.adapter or args.blend is not None or args.weights_of != "trained" or args.prove):
        parser.error("found --weights with --adapter, --blend, --weights-of or --prove; expected --weights alone")
    if (args.blend is None) != (args.start is None):
        parser.error("found one of --blend and --start; expected both, such as --blend 0.6 --start models/cogvlm")
    others = [f"--{name}" for name in ("adapter", "blend", "weights") if getattr(args, name)]
    if args.base is not None and others:
        parser.error(f"found --base and {others[0]}; expected one of them. Leave {others[0]} out")
    if args.prove is not None and args.prove < 0:
        parser.error(f"--prove {args.prove}: expected 0 or more")
    if args.prove:
        say(f"--prove {args.prove}: answers are no longer compared, weights are; launch/evaluate.py measures answers")
    start_logging(logging.WARNING, "%(message)s")
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Export, compare and report; return the exit code."""
    with fast_imports():
        import torch

        from cogvlm_ft.checkpoints.choice import best_checkpoint, is_run
        from cogvlm_ft.export.adapter import export_adapter, export_merged
        from cogvlm_ft.export.blend import Blend
        from cogvlm_ft.export.export import export_checkpoint, rejected_path
        from cogvlm_ft.export.quantized import export_quantized

    checkpoint = best_checkpoint(args.checkpoint) if is_run(args.checkpoint) else args.checkpoint
    averaged = args.weights_of == "ema"
    dtype = getattr(torch, DTYPES[args.dtype])
    if args.base is not None:
        num_tensors = export_merged(checkpoint, args.base, args.out, dtype)
        say(f"merged {checkpoint} into {args.base}: {num_tensors} tensors in {args.out}")
        return 0
    if args.weights:
        num_bytes = export_quantized(checkpoint, args.out, args.weights)
        say(f"exported to {args.out}: {args.weights} weights, {num_bytes / 2**30:.2f} GiB; launch/predict.py loads it")
        return 0
    if args.adapter:
        num_tensors = export_adapter(checkpoint, args.out, averaged=averaged)
        say(f"exported {num_tensors} tensors of adapters to {args.out}, for peft's PeftModel.from_pretrained")
        return 0
    say(f"comparing {checkpoint} with its manifest", flush=True)
    blend = None if args.start is None else Blend(args.blend, args.start)
    proof = export_checkpoint(checkpoint, args.out, dtype, verify=args.prove != 0, blend=blend, averaged=averaged)
    if proof:
        say(proof.summary("blend" if blend else "checkpoint"), file=sys.stderr if proof.problems else sys.stdout)
    if proof and proof.problems:
        say(f"not exported to {args.out}; the rejected model folder is {rejected_path(args.out)}", file=sys.stderr)
        return 1
    example = paste("predict", "--model", args.out, "--image", "photo.jpg", "--prompt", "Where is the dog?")
    say(f"exported to {args.out}; try it with\n  {example}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
