"""Whether fp32 products may be computed in TF32, which has 10 bits of mantissa instead of 23."""

from __future__ import annotations

import torch


def allow_tf32(allowed: bool) -> None:
    """Set it for matrix products and convolutions; by default, torch allows it for convolutions only."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
