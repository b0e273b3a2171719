"""The attention patterns against one dense mask, and the choice of layers that are recomputed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cogvlm_ft.model import CogVLMForCausalLM, enable_gradient_checkpointing
from cogvlm_ft.model.attention import AttendInTurns, attend_causally
from cogvlm_ft.model.layout import block_mask, build_layout, turn_mask

NUM_PATCHES = 9


def rows_of_turns() -> torch.Tensor:
    """i32[2, L]: three turns in one row, one in the other, which is padded."""
    rows = [build_layout(NUM_PATCHES, lengths).block_ids for lengths in ([4, 1, 6], [3])]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def test_the_mask_of_turns_is_the_end_of_the_whole_mask() -> None:
    block_ids = rows_of_turns()
    prefix_length = NUM_PATCHES + 3
    found = turn_mask(block_ids, prefix_length)
    wanted = block_mask(block_ids)[:, :, prefix_length:]
    assert torch.equal(found[block_ids[:, None, prefix_length:] >= 0], wanted[block_ids[:, None, prefix_length:] >= 0])
    assert found.any(dim=-1).all(), "a position that attends to nothing would be NaN on some backends"


def test_turns_see_what_a_dense_mask_shows_them() -> None:
    block_ids, prefix_length = rows_of_turns(), NUM_PATCHES + 3
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, 2, block_ids.shape[1], 8, dtype=torch.float64, requires_grad=True) for _ in "qkv"
    )
    attend = AttendInTurns(prefix_length, turn_mask(block_ids, prefix_length))
    is_token = (block_ids >= 0)[:, None, :, None]
    results = []
    for out in (
        attend(query, key, value),
        F.scaled_dot_product_attention(query, key, value, attn_mask=block_mask(block_ids)),
    ):
        kept = out.masked_fill(~is_token, 0)
        results.append([kept, *torch.autograd.grad(kept.pow(2).sum(), (query, key, value))])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


def test_a_single_query_sees_all_keys() -> None:
    query, key, value = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4)
    wanted = torch.softmax(query @ key.mT / 2, dim=-1) @ value
    torch.testing.assert_close(attend_causally(query, key, value), wanted)


@pytest.mark.parametrize(
    ("which", "vision", "language"),
    [
        ("none", [False, False], [False, False]),
        ("vision", [True, True], [False, False]),
        ("language", [False, False], [True, True]),
        ("all", [True, True], [True, True]),
        ("1", [True, True], [True, True]),
        ("2", [True, False], [True, False]),
    ],
)
def test_which_layers_are_computed_twice(
    tiny_model: CogVLMForCausalLM, which: str, vision: list[bool], language: list[bool]
) -> None:
    enable_gradient_checkpointing(tiny_model, which)
    towers = (tiny_model.model.vision.transformer.layers, tiny_model.model.layers)
    assert [[layer.gradient_checkpointing for layer in layers] for layers in towers] == [vision, language]
