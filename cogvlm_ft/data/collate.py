"""Collate examples of different lengths into one right-padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cogvlm_ft.data.encode import Sequences
from cogvlm_ft.data.plan import Item
from cogvlm_ft.model.cogvlm import IGNORE_INDEX
from cogvlm_ft.model.layout import PAD_BLOCK


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used, with the reason as one word. detail: for people; names the field."""

    key: str
    reason: str
    detail: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}" + (f": {self.detail}" if self.detail else "")


@dataclass(frozen=True)
class Example:
    """One image with all its turns.

    item: what the loader was asked for. pixel_values: float[3, S, S].
    weight: that of the item, or 0 if a neighbour replaces an unusable sample; such a row has no labels.
    num_cut_boxes: boxes left out of its answers because the list would be too long.
    """

    key: str
    item: Item
    pixel_values: Tensor
    sequences: Sequences
    weight: float
    num_turns: int
    bad: BadSample | None = None
    num_cut_boxes: int = 0


@dataclass(frozen=True)
class Batch:
    """B examples of up to L tokens.

    pixel_values: float[B, 3, S, S]. input_ids, labels, position_ids: int64[B, L]. block_ids: int32[B, L].
    weight: float[B]. keys, items: one per row. row_target_tokens: labelled tokens of each row, 0 if its weight is 0.
    bad: samples that could not be used.
    """

    pixel_values: Tensor
    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    block_ids: Tensor
    weight: Tensor
    keys: list[str]
    items: list[Item]
    row_target_tokens: list[int]
    num_turns: int
    bad: list[BadSample]
    num_cut_boxes: int = 0

    def to(self, device: torch.device) -> Batch:
        """Return the same batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    @property
    def num_target_tokens(self) -> int:
        """Number of labelled tokens."""
        return sum(self.row_target_tokens)

    @property
    def num_tokens(self) -> int:
        """Number of tokens without padding."""
        return int((self.block_ids != PAD_BLOCK).sum())


def collate(examples: Sequence[Example]) -> Batch:
    """Pad all examples to the longest one and remove the labels of examples of weight 0.

    Padding is unlabelled and in block PAD_BLOCK.
    """
    weight = torch.tensor([example.weight for example in examples])
    labels = _pad([example.sequences.labels for example in examples], IGNORE_INDEX)
    labels = labels.masked_fill((weight == 0)[:, None], IGNORE_INDEX)
    return Batch(
        pixel_values=torch.stack([example.pixel_values for example in examples]),
        input_ids=_pad([example.sequences.input_ids for example in examples], 0),
        labels=labels,
        position_ids=_pad([example.sequences.position_ids for example in examples], 0),
        block_ids=_pad([example.sequences.block_ids for example in examples], PAD_BLOCK),
        weight=weight,
        keys=[example.key for example in examples],
        items=[example.item for example in examples],
        row_target_tokens=(labels != IGNORE_INDEX).sum(dim=1).tolist(),
        num_turns=sum(example.num_turns for example in examples if example.weight > 0),
        bad=[example.bad for example in examples if example.bad is not None],
        num_cut_boxes=sum(example.num_cut_boxes for example in examples if example.weight > 0),
    )


def _pad(rows: Sequence[Tensor], value: int) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=value)
