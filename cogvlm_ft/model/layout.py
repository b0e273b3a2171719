"""Layout of a CogVLM sequence: token types, position ids, block ids, and attention masks.

A sequence is `bos | boi, N patches, eoi | text`. The rules are those of the reference implementation:

* all N + 2 image positions have token type VISION; boi and the patches use the vision expert, eoi the language expert;
* all patches share one position id: bos 0, boi 1, patches 2, eoi 3, first text token 4, then +1 each;
* attention is causal everywhere, the image included.

CogVLM is causal and the image comes first, so an image's hidden states do not depend on the question. Several turns
about one image can therefore share its prefix exactly: each turn is a block that attends to the prefix (block 0) and
itself, and its position ids restart directly after eoi.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LANGUAGE, VISION = 0, 1
PREFIX_BLOCK, PAD_BLOCK = 0, -1


@dataclass(frozen=True)
class SequenceLayout:
    """Positions of one unpadded sequence of L tokens.

    image_span: (start, stop) of boi, patches and eoi.
    position_ids: i64[L]. block_ids: i32[L], 0 = prefix, k = turn k.
    """

    image_span: tuple[int, int]
    position_ids: Tensor
    block_ids: Tensor


def image_span(num_patches: int) -> tuple[int, int]:
    """Return (start, stop) of the image positions boi, patches and eoi, which follow bos."""
    return 1, num_patches + 3


def vision_expert_span(num_patches: int) -> tuple[int, int]:
    """Return (start, stop) of the positions that use the vision expert: boi and the patches."""
    return 1, num_patches + 2


def build_layout(num_patches: int, turn_lengths: Sequence[int]) -> SequenceLayout:
    """Build the layout of `[bos boi patches eoi | turn 1 | ... | turn K]` for K turns of the given token counts."""
    prefix = torch.tensor([0, 1] + [2] * num_patches + [3])
    turns = [torch.arange(4, 4 + length) for length in turn_lengths]
    blocks = [torch.full((len(prefix),), PREFIX_BLOCK)]
    blocks += [torch.full((length,), k + 1) for k, length in enumerate(turn_lengths)]
    return SequenceLayout(image_span(num_patches), torch.cat([prefix, *turns]), torch.cat(blocks).to(torch.int32))


def vision_expert_mask(token_type_ids: Tensor) -> Tensor:
    """Return bool[B, L] from i64[B, L]: vision type here AND at the next position: boi and patches, not eoi."""
    mask = torch.zeros_like(token_type_ids, dtype=torch.bool)
    mask[:, :-1] = (token_type_ids[:, :-1] == VISION) & (token_type_ids[:, 1:] == VISION)
    return mask


def build_position_ids(token_type_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Build i64[B, L] position ids from token types i64[B, L] and a 0/1 mask [B, L].

    The id starts at 0. It increases by one at every language token (boi and eoi count as such) and at the first patch
    of an image, never at a masked token.
    """
    is_vision = token_type_ids == VISION
    before = F.pad(is_vision[:, :-1], (1, 0))
    after = F.pad(is_vision[:, 1:], (0, 1))
    is_patch = is_vision & before & after
    first_patch = is_patch & ~F.pad(is_patch[:, :-1], (1, 0))
    grows = ~is_patch | first_patch
    grows[:, 0] = False
    if attention_mask is not None:
        grows = grows & attention_mask.bool()
    return grows.long().cumsum(-1)


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Return bool[Q, K]: the queries are the last Q of K positions and attend to themselves and all earlier ones."""
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)
    return torch.arange(num_keys, device=device) <= queries[:, None]


def block_mask(block_ids: Tensor) -> Tensor:
    """Return bool[B, 1, L, L]: token i attends to j iff j <= i and j is in the prefix or in i's own block."""
    same = block_ids[:, :, None] == block_ids[:, None, :]
    prefix = (block_ids == PREFIX_BLOCK)[:, None, :]
    length = block_ids.shape[1]
    return ((same | prefix) & causal_mask(length, length, block_ids.device))[:, None]


def turn_mask(block_ids: Tensor, prefix_length: int) -> Tensor:
    """Return bool[B, 1, L - prefix_length, L]: the rows of `block_mask` after the prefix."""
    text = block_ids[:, prefix_length:]
    among_text = (text[:, :, None] == text[:, None, :]).tril()
    return F.pad(among_text, (prefix_length, 0), value=True)[:, None]


def padding_mask(attention_mask: Tensor, num_queries: int) -> Tensor:
    """Return bool[B, 1, Q, K] from the 0/1 mask [B, K]: causal, with padded keys hidden.

    Every token attends to itself, so that no row is empty.
    """
    num_keys = attention_mask.shape[1]
    causal = causal_mask(num_queries, num_keys, attention_mask.device)
    itself = torch.eye(num_keys, dtype=torch.bool, device=attention_mask.device)[-num_queries:]
    return ((causal & attention_mask.bool()[:, None, :]) | itself)[:, None]
