"""Convert checkpoints of the official repository (SAT) to model folders, and model folders to such checkpoints.

Reads mp_rank_00_model_states.pt (model-parallel 1), one tensor at a time, without executing code from it. --files is a
published model folder of the same size, from which config.json and the tokenizer are copied; its weights are not
needed. To use a result in SAT, copy model_config.json from the original SAT folder.

Examples:
  python launch/convert_sat.py --sat cogvlm-grounding-base --files models/cogvlm --out models/from_sat
  python launch/convert_sat.py --model exported --out for_sat --dtype bf16
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from cogvlm_ft.command_line import build_parser, exit_code, fast_imports
    from cogvlm_ft.terminal import say
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--sat", type=Path, help="SAT folder, or its .pt file, to convert to a model folder")
    source.add_argument("--model", type=Path, help="model folder or checkpoint to convert to a SAT folder")
    parser.add_argument("--files", type=Path, help="with --sat: folder with config.json and tokenizer.model")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="type of the written weights (default: bf16)")
    args = parser.parse_args(argv)
    if (args.sat is None) != (args.files is None):
        parser.error("expected --files with --sat, and not with --model")
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    with fast_imports():
        import torch

        from cogvlm_ft.export.convert import from_sat, to_sat

    dtype = getattr(torch, DTYPES[args.dtype])
    if args.sat is not None:
        num_tensors = from_sat(args.sat, args.files, args.out, dtype)
    else:
        num_tensors = to_sat(args.model, args.out, dtype)
    say(f"converted {num_tensors} tensors to {args.out}")


if __name__ == "__main__":
    sys.exit(main())
