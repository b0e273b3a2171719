"""Attention patterns, all on torch SDPA; each takes query, key and value float[B, heads, L, D]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_causally(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend from every position to itself and all earlier ones; a single query attends to all keys."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1)


@dataclass(frozen=True)
class AttendMasked:
    """mask: bool[B, 1, Q, K], True where a query attends to a key."""

    mask: Tensor

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)


@dataclass(frozen=True)
class AttendInTurns:
    """Attend causally in the image prefix, and from every turn to the prefix and itself (layout.turn_mask).

    mask: bool[B, 1, T, L], the T text positions against all. The prefix, nearly all of the sequence, needs none: that
    saves half the multiplications of a masked [L, L], and allows the fast kernel on CUDA.
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
