"""Encode an image's turns as one sequence: token ids, labels, position ids and block ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Turn
from cogvlm_ft.model.cogvlm import IGNORE_INDEX
from cogvlm_ft.model.configuration import CogVLMConfig
from cogvlm_ft.model.layout import build_layout
from cogvlm_ft.model.prompt import Encoder, render_prompt


@dataclass(frozen=True)
class Sequences:
    """All int64[L] except block_ids, int32[L]. `labels` are IGNORE_INDEX except at answers and their eos."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    block_ids: Tensor


def encode_prompt(
    prompt: str, tokenizer: Encoder, template_version: str, history: Sequence[tuple[str, str]] = ()
) -> list[int]:
    """Return the token ids between the image and the answer.

    history: earlier (prompt, answer) pairs; the template "base" omits them, as the reference implementation does.
    Raises DataError if there are no ids: the last one predicts the first token of the answer.
    """
    ids = tokenizer.encode(render_prompt(prompt, template_version, history))
    if not ids:
        raise DataError("turn: found an empty prompt; expected at least one token. Write a prompt")
    return ids


def encode_turns(turns: Sequence[Turn], tokenizer: Encoder, config: CogVLMConfig) -> Sequences:
    """Encode `[bos boi patches eoi | prompt answer eos | prompt answer eos | ...]`.

    Prompt and answer are tokenized separately. A turn's history is part of its prompt, unlabelled: no turn attends to
    another turn's block.
    """
    ids = [tokenizer.bos_token_id] + [config.pad_token_id or 0] * (config.num_patches + 2)
    labels = [IGNORE_INDEX] * len(ids)
    lengths = []
    for turn in turns:
        prompt = encode_prompt(turn.prompt, tokenizer, config.template_version, turn.history)
        answer = [*tokenizer.encode(turn.answer), tokenizer.eos_token_id]
        ids += prompt + answer
        labels += [IGNORE_INDEX] * len(prompt) + answer
        lengths.append(len(prompt) + len(answer))
    layout = build_layout(config.num_patches, lengths)
    return Sequences(torch.tensor(ids), torch.tensor(labels), layout.position_ids, layout.block_ids)
