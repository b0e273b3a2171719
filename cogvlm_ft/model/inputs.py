"""The two forms of a model call: one image per row with any number of turns, and the published one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PublishedInputs:
    """The arguments of the published remote code, also used by `generate()` and for decoding after either form.

    input_ids: i64[B, L], or instead of them inputs_embeds: float[B, L, H].
    images: per row a list of 0 or 1 float[3, S, S]; ignored once the cache is not empty.
    token_type_ids: i64[B, L] or, without position_ids, of the whole sequence; None = no image.
    attention_mask: i64[B, keys], 0 for padding, or bool[B, 1, L, keys] (cache.py).
    position_ids: i64[B, L]; None = computed from the token types.
    """

    input_ids: Tensor | None = None
    images: list[list[Tensor]] | None = None
    token_type_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None


@dataclass(frozen=True)
class TurnInputs:
    """The form of training and prefill: one image in every row, directly after bos, then turns. Static shapes.

    input_ids: i64[B, L]. pixel_values: float[B, 3, S, S].
    position_ids: i64[B, L]; None = those of one turn. block_ids: i32[B, L] (layout.py); None = one turn.
    """

    input_ids: Tensor
    pixel_values: Tensor
    position_ids: Tensor | None = None
    block_ids: Tensor | None = None


def choose_form(
    published: PublishedInputs, pixel_values: Tensor | None, block_ids: Tensor | None
) -> PublishedInputs | TurnInputs:
    """Return the form that the arguments of a call belong to; raise ValueError if they mix both."""
    if pixel_values is None and block_ids is None:
        return published
    if published.input_ids is None or pixel_values is None:
        raise ValueError("pixel_values, block_ids: found without the rest; expected input_ids and pixel_values")
    for name in ("images", "token_type_ids", "attention_mask", "inputs_embeds"):
        if getattr(published, name) is not None:
            raise ValueError(f"{name}: found with pixel_values; expected only input_ids, position_ids and block_ids")
    return TurnInputs(published.input_ids, pixel_values, published.position_ids, block_ids)
