"""Chains of elementwise operations, one function each, so that torch.compile can make one kernel of each.

They own no parameters: under ZeRO-3 modules gather theirs in hooks, which break a compiled graph in pieces. Callers
name them through this module, so that `compile_elementwise` reaches all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In float32, the product with the weight included; then back to the input's dtype."""
    x = hidden.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.float() * x).to(hidden.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half rotation of float[B, heads, L, D] by tables [B, 1, L, D]: dimension j pairs with j + D / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def gated(activation: Callable[[Tensor], Tensor], gate: Tensor, value: Tensor) -> Tensor:
    """activation(gate) * value"""
    return activation(gate) * value


def compile_elementwise() -> None:
    """For the whole process, from now on. The first step then takes a minute longer; sizes may change without another.

    Needs a C++ compiler, or Triton on CUDA.
    """
    for function in (rms_norm, rotate, gated):
        globals()[function.__name__] = torch.compile(function, dynamic=True)
