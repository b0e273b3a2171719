"""Chains of elementwise operations, one function each, so that torch.compile can fuse each into one kernel.

They own no parameters: under ZeRO-3, modules gather theirs in hooks, which break a compiled graph. Callers access them
through this module, so that `compile_elementwise` affects all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize in float32, the product with the weight included; then convert to the input's dtype."""
    x = hidden.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.float() * x).to(hidden.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply half rotation to float[B, heads, L, D] with tables [B, 1, L, D]: dimension j pairs with j + D / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def gated(activation: Callable[[Tensor], Tensor], gate: Tensor, value: Tensor) -> Tensor:
    """Return activation(gate) * value."""
    return activation(gate) * value


def compile_elementwise() -> None:
    """Compile all functions of this module for the rest of the process.

    The first step then takes a minute longer; other sizes need no further compilation. Needs a C++ compiler, or Triton
    on CUDA.
    """
    for function in (rms_norm, rotate, gated):
        globals()[function.__name__] = torch.compile(function, dynamic=True)
