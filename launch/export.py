"""Turn a training checkpoint into a model folder: safetensors with the published names, config, tokenizer.

    python launch/export.py --checkpoint runs/grounding/checkpoints/step-00000100 --out exported [--dtype bf16]

Runs on one CPU, also while training goes on elsewhere. DeepSpeed's files are pickles: open only checkpoints you trust.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cogvlm_ft.errors import CheckpointError

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a step-* folder of a run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    args = parser.parse_args(argv)

    import torch

    from cogvlm_ft.train.export import export_checkpoint

    try:
        export_checkpoint(args.checkpoint, args.out, getattr(torch, DTYPES[args.dtype]))
    except CheckpointError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: try it with\n  python launch/predict.py --model {args.out} --image PHOTO --prompt QUESTION")
    return 0


if __name__ == "__main__":
    sys.exit(main())
