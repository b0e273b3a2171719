"""A call has one of two forms; a mixture is refused instead of half ignored."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cogvlm_ft.model import CogVLMForCausalLM

IDS = torch.arange(5, 36)[None]
PIXELS = torch.zeros(1, 3, 56, 56)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": IDS, "pixel_values": PIXELS, "images": [[PIXELS[0]]]}, "images: found with pixel_values"),
        ({"input_ids": IDS, "pixel_values": PIXELS, "attention_mask": torch.ones_like(IDS)}, "attention_mask: found"),
        ({"input_ids": IDS, "pixel_values": PIXELS, "token_type_ids": IDS}, "token_type_ids: found"),
        ({"input_ids": IDS, "block_ids": torch.zeros_like(IDS)}, "expected input_ids and pixel_values"),
        ({"pixel_values": PIXELS}, "expected input_ids and pixel_values"),
        ({}, "expected exactly one"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(1, 31, 64)}, "expected exactly one"),
    ],
)
def test_a_mixture_of_both_forms_is_refused(
    tiny_model: CogVLMForCausalLM, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(**arguments)


def test_pixels_are_refused_once_the_cache_is_filled(tiny_model: CogVLMForCausalLM) -> None:
    cache = tiny_model(input_ids=IDS, pixel_values=PIXELS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="expected at the first step only"):
        tiny_model(input_ids=IDS[:, :1], pixel_values=PIXELS, past_key_values=cache)


def test_position_ids_are_required_with_a_filled_cache(tiny_model: CogVLMForCausalLM) -> None:
    cache = tiny_model(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="position_ids: not found"):
        tiny_model(input_ids=IDS[:, :1], past_key_values=cache)
