"""Greedy answers for many turns at once: one pass over each image, its turns decode together behind it.

Every rank makes the same calls: one image pass, one prompt pass, then one call per new token until the last rank is
done. Under ZeRO-3 each call gathers parameters from all ranks, so a rank that left early would stop the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from cogvlm_ft.data.encode import encode_prompt
from cogvlm_ft.model.configuration import CogVLMConfig
from cogvlm_ft.model.tokenizer import CogVLMTokenizer
from cogvlm_ft.runtime.distributed import every_rank

FIRST_TEXT_POSITION = 4  # bos 0, boi 1, patches 2, eoi 3


def generate_answers(
    model: Any,
    tokenizer: CogVLMTokenizer,
    pixel_values: Tensor,
    prompts: Sequence[Sequence[str]],
    max_new_tokens: int,
    histories: Sequence[Sequence[Sequence[tuple[str, str]]]] | None = None,
) -> list[list[str]]:
    """Collective. Answers to `prompts[b]` (at least one each) about image b of float[B, 3, S, S].

    Equal, id by id, to asking every question alone. histories: for each prompt the (prompt, answer) pairs before it.
    """
    config: CogVLMConfig = model.config
    cache = DynamicCache(config=config)
    _read_images(model, tokenizer, pixel_values, cache)
    owners = [b for b, questions in enumerate(prompts) for _ in questions]
    cache.batch_select_indices(torch.tensor(owners, device=pixel_values.device))
    pasts = [past for of_image in histories for past in of_image] if histories else [()] * len(owners)
    asked = zip((question for questions in prompts for question in questions), pasts, strict=True)
    rows = [encode_prompt(question, tokenizer, config.template_version, past) for question, past in asked]
    answers = iter(_decode(model, tokenizer, rows, cache, pixel_values.device, max_new_tokens))
    return [[tokenizer.decode(next(answers)) for _ in questions] for questions in prompts]


def _read_images(model: Any, tokenizer: CogVLMTokenizer, pixel_values: Tensor, cache: DynamicCache) -> None:
    """Fill the cache with `bos boi patches eoi`."""
    prefix = torch.zeros(len(pixel_values), model.config.num_patches + 3, dtype=torch.long, device=pixel_values.device)
    prefix[:, 0] = tokenizer.bos_token_id
    model(input_ids=prefix, pixel_values=pixel_values, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _decode(
    model: Any,
    tokenizer: CogVLMTokenizer,
    rows: Sequence[list[int]],
    cache: DynamicCache,
    device: torch.device,
    max_new_tokens: int,
) -> list[list[int]]:
    """New ids per row, up to and with eos. Prompts are left-padded between the shared prefix and their own text."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    num_pads = torch.tensor([width - len(row) for row in rows], device=device)
    columns = torch.arange(width, device=device)
    position_ids = FIRST_TEXT_POSITION + (columns - num_pads[:, None]).clamp(min=0)
    prefix_mask = torch.ones(len(rows), cache.get_seq_length(), dtype=torch.long, device=device)
    attention_mask = torch.cat([prefix_mask, (columns >= num_pads[:, None]).long()], dim=1)

    finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
    new_ids: list[Tensor] = []
    while True:
        out = model(
            input_ids=ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        ids = out.logits[:, -1].argmax(dim=-1, keepdim=True).masked_fill(finished[:, None], tokenizer.eos_token_id)
        new_ids.append(ids)
        finished |= ids[:, 0] == tokenizer.eos_token_id
        if len(new_ids) == max_new_tokens or every_rank(bool(finished.all())):
            return torch.cat(new_ids, dim=1).tolist()
        position_ids = position_ids[:, -1:] + 1
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), 1)], dim=1)
