"""Turn a training checkpoint into a model folder: safetensors with the published names, config, tokenizer, model card.

    python launch/export.py --checkpoint runs/grounding/checkpoints/step-00000100 --out exported [--dtype bf16]

Runs on a CPU, one tensor at a time, also while training goes on elsewhere. Then it reads the folder back and compares
it with the checkpoint: every weight, and the answers to --prove samples (0: no comparison). One that differs is not
put at --out, and the exit code is 1; 2: it could not be made.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from cogvlm_ft.errors import CheckpointError

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a step-* folder of a run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--prove", type=int, default=10, metavar="N", help="samples that are compared (default: 10)")
    args = parser.parse_args(argv)
    if args.prove < 0:
        parser.error(f"--prove {args.prove}: wanted 0 or more")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)

    import torch

    from cogvlm_ft.export.export import export_checkpoint, rejected_path

    print(f"comparing {args.checkpoint} with its manifest", flush=True)
    try:
        dtype = getattr(torch, DTYPES[args.dtype])
        proof = export_checkpoint(args.checkpoint, args.out, dtype, num_samples=args.prove)
    except CheckpointError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if proof:
        print(proof.summary(), file=sys.stderr if proof.problems else sys.stdout)
    if proof and proof.problems:
        print(f"it was not put at {args.out}; it lies in {rejected_path(args.out)}", file=sys.stderr)
        return 1
    print(f"{args.out}: try it with\n  python launch/predict.py --model {args.out} --image PHOTO --prompt QUESTION")
    return 0


if __name__ == "__main__":
    sys.exit(main())
