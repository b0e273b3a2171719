"""Positions, blocks and masks, written out by hand for images of one to three patches."""

from __future__ import annotations

import pytest
import torch

from cogvlm_ft.model.layout import (
    block_mask,
    build_layout,
    build_position_ids,
    causal_mask,
    image_span,
    padding_mask,
    vision_expert_mask,
    vision_expert_span,
)


def rows(mask: torch.Tensor) -> list[str]:
    """Return bool[Q, K] as one string of 0 and 1 per query."""
    return ["".join(str(int(seen)) for seen in row) for row in mask]


def test_two_turns_behind_two_patches() -> None:
    layout = build_layout(2, [3, 1])
    #                                      bos boi patches eoi  turn 1  turn 2
    assert layout.position_ids.tolist() == [0, 1, 2, 2, 3, 4, 5, 6, 4]
    assert layout.block_ids.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 2]
    assert layout.image_span == (1, 5)
    assert (layout.position_ids.dtype, layout.block_ids.dtype) == (torch.int64, torch.int32)


def test_an_image_without_turns() -> None:
    layout = build_layout(1, [])
    assert layout.position_ids.tolist() == [0, 1, 2, 3]
    assert layout.block_ids.tolist() == [0, 0, 0, 0]


def test_spans_are_those_of_the_token_types() -> None:
    for num_patches in (1, 3, 16):
        types = torch.tensor([[0] + [1] * (num_patches + 2) + [0, 0]])
        start, stop = image_span(num_patches)
        assert types[0].nonzero()[:, 0].tolist() == list(range(start, stop))
        start, stop = vision_expert_span(num_patches)
        assert vision_expert_mask(types)[0].nonzero()[:, 0].tolist() == list(range(start, stop))


def test_the_vision_expert_serves_boi_and_patches_but_not_eoi() -> None:
    types = torch.tensor([[0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1]])
    assert rows(vision_expert_mask(types)) == ["0111000", "0000000", "0001110"]


@pytest.mark.parametrize(
    ("types", "mask", "wanted"),
    [
        pytest.param([0, 1, 1, 1, 1, 1, 0, 0], None, [0, 1, 2, 2, 2, 3, 4, 5], id="image"),
        pytest.param([0, 1, 1, 1, 0, 0], None, [0, 1, 2, 3, 4, 5], id="one patch"),
        pytest.param([0, 0, 0, 0], None, [0, 1, 2, 3], id="text only"),
        pytest.param([0, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0], [0, 1, 2, 2, 3, 4, 4, 4], id="right pads"),
        # The reference counts the first real token after left pads; only differences matter to rotary embeddings.
        pytest.param([0, 0, 0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 2, 3, 3, 4, 5], id="left pads"),
        pytest.param([0, 0, 1, 1, 1, 1, 0, 0], None, [0, 1, 2, 3, 3, 4, 5, 6], id="text before the image"),
    ],
)
def test_position_ids(types: list[int], mask: list[int] | None, wanted: list[int]) -> None:
    attention_mask = None if mask is None else torch.tensor([mask])
    assert build_position_ids(torch.tensor([types]), attention_mask).tolist() == [wanted]


def test_position_ids_of_each_row_are_its_own() -> None:
    types = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]])
    assert build_position_ids(types).tolist() == [[0, 1, 2, 2, 3, 4], [0, 1, 2, 3, 4, 5]]


def test_a_layout_of_one_turn_has_the_published_position_ids() -> None:
    types = torch.tensor([[0] + [1] * 18 + [0] * 7])
    assert build_layout(16, [7]).position_ids.tolist() == build_position_ids(types)[0].tolist()


def test_queries_are_the_last_of_the_keys() -> None:
    assert rows(causal_mask(3, 3, torch.device("cpu"))) == ["100", "110", "111"]
    assert rows(causal_mask(2, 4, torch.device("cpu"))) == ["1110", "1111"]


def test_a_block_sees_the_prefix_and_itself() -> None:
    mask = block_mask(torch.tensor([[0, 0, 1, 1, 2, 2, -1]]))
    assert mask.shape == (1, 1, 7, 7)
    assert rows(mask[0, 0]) == [
        "1000000",
        "1100000",
        "1110000",
        "1111000",
        "1100100",
        "1100110",
        "1100001",
    ]


def test_padded_keys_are_hidden_but_no_query_is_blind() -> None:
    mask = padding_mask(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]), num_queries=4)
    assert mask.shape == (2, 1, 4, 4)
    assert rows(mask[0, 0]) == ["1000", "0100", "0010", "0011"]
    assert rows(mask[1, 0]) == ["1000", "1100", "1110", "1111"]


def test_pads_between_what_was_read_and_what_is_asked() -> None:
    """Two cached keys, then a left-padded question of two tokens and one pad."""
    mask = padding_mask(torch.tensor([[1, 1, 0, 1, 1]]), num_queries=3)
    assert rows(mask[0, 0]) == ["11100", "11010", "11011"]
