"""Who sees whom: each way to attend takes query, key and value float[B, heads, L, D], all on torch SDPA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_causally(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every position sees itself and what came before; a single query sees all keys."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1)


@dataclass(frozen=True)
class AttendMasked:
    """mask: bool[B, 1, Q, K], True where a query sees a key."""

    mask: Tensor

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)


@dataclass(frozen=True)
class AttendInTurns:
    """The image prefix is causal, and every turn sees the prefix and itself (layout.turn_mask).

    mask: bool[B, 1, T, L], the T text positions against all. The prefix, nearly all of the sequence, needs none: that
    is half the multiplications of a masked [L, L], and on CUDA the fast kernel.
    """

    prefix_length: int
    mask: Tensor

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        prefix, text = (slice(None, self.prefix_length), slice(self.prefix_length, None))
        seen = F.scaled_dot_product_attention(
            query[:, :, prefix], key[:, :, prefix], value[:, :, prefix], is_causal=True
        )
        return torch.cat(
            [seen, F.scaled_dot_product_attention(query[:, :, text], key, value, attn_mask=self.mask)], dim=2
        )
