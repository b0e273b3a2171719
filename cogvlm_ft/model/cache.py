"""Keys and values of a whole generation in preallocated buffers, with one prefix per image for all its questions.

The slots of an image: `bos boi patches eoi | prompt 1 | ... | prompt T | pads | token 1 of turns 1..T | token 2 ...`.
Where memory does not suffice for all turns, those of a chunk give their slots to the next one; the prefix stays.
Turns that are finished get no more slots, and images without other turns are dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor


class TurnCache:
    """The `past_key_values` of a generation that answers T turns of each of B images together."""

    def __init__(
        self, block_ids: Tensor, num_turns: int, max_new_tokens: int, num_layers: int, num_slots: int = 0
    ) -> None:
        """Compute which slots each turn attends to, for all steps.

        block_ids: i32[B, L] of prefix and prompts (layout.py). num_turns: T, the same for all images: an image with
        fewer turns gets unused slots. num_slots: to allocate, if a later chunk needs more than this one.
        """
        self._lay_out(block_ids, num_turns)
        self._num_slots = max(num_slots, slots_needed(block_ids, num_turns, max_new_tokens))
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._filled = [0] * num_layers

    def _lay_out(self, block_ids: Tensor, num_turns: int) -> None:
        turns = torch.arange(1, num_turns + 1, dtype=block_ids.dtype, device=block_ids.device)
        self._turns = turns.expand(len(block_ids), -1)  # i32[B, T], of the next tokens
        self._owners = block_ids  # i32[B, slots]: the turn that each filled slot belongs to; 0: all turns

    def restart(self, block_ids: Tensor, num_turns: int, max_new_tokens: int, prefix_length: int) -> None:
        """Keep the first `prefix_length` slots, and give all others to the turns of another chunk."""
        self._lay_out(block_ids, num_turns)
        num_slots = slots_needed(block_ids, num_turns, max_new_tokens)
        assert num_slots <= self._num_slots, "num_slots is that of the largest chunk"
        self._filled = [prefix_length] * len(self._filled)

    def get_seq_length(self) -> int:
        """Return the number of slots that are filled in all layers."""
        return self._filled[-1]

    def keep(self, rows: Tensor, columns: Tensor) -> None:
        """Continue with fewer turns: i64[B'] images, and of each the turns at i64[B', T'] among its present ones."""
        if len(rows) < len(self._owners):
            self._owners, self._turns = self._owners[rows], self._turns[rows]
            for tensors in (self._keys, self._values):
                for layer, tensor in enumerate(tensors):  # one by one: little more memory than before
                    tensors[layer] = tensor[rows]
        self._turns = self._turns.gather(1, columns)

    def add_step(self) -> Tensor:
        """Give the next slots to one token of every turn.

        Returns bool[B, 1, T, filled + T]: each attends to the prefix, its prompt and its answer.
        """
        self._owners = torch.cat([self._owners, self._turns], dim=1)
        owners = self._owners[:, None, None]
        return (owners == 0) | (owners == self._turns[:, None, :, None])

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Store float[B, heads, L, D] in the next L slots; return views of all filled ones."""
        if layer_idx == len(self._keys):
            batch, heads, _, head_dim = key.shape
            shape = (batch, heads, self._num_slots, head_dim)
            self._keys.append(key.new_empty(shape))
            self._values.append(value.new_empty(shape))
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        start, stop = self._filled[layer_idx], self._filled[layer_idx] + key.shape[2]
        keys[:, :, start:stop], values[:, :, start:stop] = key, value
        self._filled[layer_idx] = stop
        return keys[:, :, :stop], values[:, :, :stop]


def slots_needed(block_ids: Tensor, num_turns: int, max_new_tokens: int) -> int:
    """Return the slots of an image for i32[B, L] of prefix and prompts, and for all new tokens but the last."""
    return block_ids.shape[1] + num_turns * (max_new_tokens - 1)
