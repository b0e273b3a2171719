"""Batches of examples with different lengths and weights."""

from __future__ import annotations

import pytest
import torch

from cogvlm_ft.data.collate import BadSample, Batch, Example, collate
from cogvlm_ft.data.encode import Sequences
from cogvlm_ft.data.plan import Item
from cogvlm_ft.model.layout import build_layout

IGNORED = -100


def example(key: str, turn_lengths: list[int], weight: float = 1.0, bad: BadSample | None = None) -> Example:
    """Build one patch, so five tokens of turn 1 after a prefix of four; the last token of each turn is labelled."""
    layout = build_layout(1, turn_lengths)
    length = len(layout.position_ids)
    ids = torch.arange(10, 10 + length)
    labels = torch.full((length,), IGNORED)
    for end in 4 + torch.tensor(turn_lengths).cumsum(0):
        labels[end - 1] = ids[end - 1]
    pixels = torch.full((3, 14, 14), float(length))
    sequences = Sequences(ids, labels, layout.position_ids, layout.block_ids)
    return Example(key, Item(0, 0, weight), pixels, sequences, weight, len(turn_lengths), bad)


@pytest.fixture
def batch() -> Batch:
    """Collate a long example, a short one, and a short one of weight 0 that replaced a bad sample."""
    bad = BadSample("broken", "broken_image")
    return collate([example("long", [3, 2]), example("short", [2]), example("filler", [2], weight=0.0, bad=bad)])


def test_rows_are_padded_on_the_right(batch: Batch) -> None:
    assert batch.input_ids.tolist() == [
        [10, 11, 12, 13, 14, 15, 16, 17, 18],
        [10, 11, 12, 13, 14, 15, 0, 0, 0],
        [10, 11, 12, 13, 14, 15, 0, 0, 0],
    ]
    assert batch.position_ids.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 4, 5],
        [0, 1, 2, 3, 4, 5, 0, 0, 0],
        [0, 1, 2, 3, 4, 5, 0, 0, 0],
    ]
    assert batch.block_ids.tolist() == [
        [0, 0, 0, 0, 1, 1, 1, 2, 2],
        [0, 0, 0, 0, 1, 1, -1, -1, -1],
        [0, 0, 0, 0, 1, 1, -1, -1, -1],
    ]


def test_weight_0_takes_the_labels_away(batch: Batch) -> None:
    assert batch.labels.tolist() == [
        [IGNORED] * 6 + [16, IGNORED, 18],
        [IGNORED] * 5 + [15] + [IGNORED] * 3,
        [IGNORED] * 9,
    ]
    assert batch.weight.tolist() == [1.0, 1.0, 0.0]


def test_counts_are_of_what_is_there(batch: Batch) -> None:
    assert batch.num_target_tokens == 3
    assert batch.num_tokens == 9 + 6 + 6
    assert batch.num_turns == 3
    assert batch.keys == ["long", "short", "filler"]
    assert batch.bad == [BadSample("broken", "broken_image")]


def test_shapes_and_types(batch: Batch) -> None:
    assert batch.pixel_values.shape == (3, 3, 14, 14)
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [9.0, 6.0, 6.0]
    assert batch.pixel_values.dtype == batch.weight.dtype == torch.float32
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert batch.block_ids.dtype == torch.int32


def test_the_examples_stay_as_they_are() -> None:
    one = example("a", [2], weight=0.0)
    before = one.sequences.labels.clone()
    collate([one])
    assert torch.equal(one.sequences.labels, before)


def test_moving_a_batch_moves_every_tensor_and_nothing_else(batch: Batch) -> None:
    moved = batch.to(torch.device("meta"))
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 6
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert (moved.keys, moved.num_turns, moved.bad) == (batch.keys, batch.num_turns, batch.bad)
    assert batch.input_ids.device.type == "cpu"
