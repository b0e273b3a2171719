"""Keys and values of a generation: where they are stored, and what each turn attends to."""

from __future__ import annotations

import torch

from cogvlm_ft.model.cache import TurnCache


def test_an_image_is_stored_once_whatever_it_is_asked() -> None:
    """The buffers never move, and there is one row of them for an image."""
    block_ids = torch.tensor([[0] * 19 + [1, 2, 2, 3, -1]] * 2, dtype=torch.int32)
    cache = TurnCache(block_ids, num_turns=3, max_new_tokens=4, num_layers=2)
    places = set()
    for length in (24, 3, 3, 3):
        for layer in range(2):
            new = torch.randn(2, 4, length, 16)
            keys, values = cache.update(new, -new, layer)
            assert torch.equal(keys[:, :, -length:], new) and torch.equal(values, -keys)
            places.add((layer, keys.data_ptr(), values.data_ptr()))
    assert cache.get_seq_length() == 24 + 3 * 3
    assert len(places) == 2


def test_the_mask_of_a_step_shows_the_prefix_and_the_own_turn() -> None:
    block_ids = torch.tensor([[0, 0, 1, 2, 2, -1], [0, 0, 1, 1, -1, -1]], dtype=torch.int32)
    cache = TurnCache(block_ids, num_turns=2, max_new_tokens=4, num_layers=1)
    keys = torch.arange(2.0)[:, None, None, None].expand(2, 1, 6, 4)  # of each image its number
    cache.update(keys, keys, 0)
    assert cache.add_step().shape == (2, 1, 2, 8)
    cache.update(keys[:, :, :2], keys[:, :, :2], 0)
    assert cache.add_step().int().tolist() == [
        [[[1, 1, 1, 0, 0, 0, 1, 0, 1, 0], [1, 1, 0, 1, 1, 0, 0, 1, 0, 1]]],
        [[[1, 1, 1, 1, 0, 0, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0, 0, 1, 0, 1]]],
    ]
    cache.update(keys[:, :, :2], keys[:, :, :2], 0)
    cache.keep(torch.tensor([1]), torch.tensor([[1]]))  # the second turn of the second image
    assert cache.add_step().int().tolist() == [[[[1, 1, 0, 0, 0, 0, 0, 1, 0, 1, 1]]]]
    found, _ = cache.update(keys[1:, :, :1], keys[1:, :, :1], 0)
    assert found.shape == (1, 1, 11, 4) and bool((found == 1).all())
