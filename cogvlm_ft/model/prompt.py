"""The published prompt templates of CogVLM v1, and the token ids of one conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cogvlm_ft.model import layout
from cogvlm_ft.model.configuration import CogVLMConfig
from cogvlm_ft.model.preprocess import preprocess_image

# The words before the answer. "base" is the query alone, without history.
ANSWER_WORDS = {"base": None, "chat": "Answer:", "vqa": "Short answer:"}


class Encoder(Protocol):
    """The required part of a tokenizer: ids without special tokens, and bos and eos."""

    bos_token_id: int
    eos_token_id: int

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]: ...


def render_prompt(query: str, template_version: str, history: Sequence[tuple[str, str]] = ()) -> str:
    """Return the text between image and answer.

    No blank follows "Answer:": sentencepiece adds it to the answer itself.
    """
    if template_version not in ANSWER_WORDS:
        raise ValueError(f"template_version: found {template_version!r}; expected one of {', '.join(ANSWER_WORDS)}")
    word = ANSWER_WORDS[template_version]
    if word is None:
        return query
    past = "".join(f"Question: {question} {word} {answer}\n" for question, answer in history)
    return f"{past}Question: {query} {word}"


def build_conversation(
    tokenizer: Encoder,
    config: CogVLMConfig,
    *,
    query: str,
    history: Sequence[tuple[str, str]] | None = None,
    images: Sequence[Any] | None = None,
    template_version: str | None = None,
    answer: str | None = None,
) -> dict[str, Any]:
    """Build `bos | image | prompt [| answer eos]` of one conversation.

    images: at most one PIL image or float[3, S, S]. Returns input_ids, token_type_ids, attention_mask (i64[L]),
    images (a list, maybe empty) and, with an answer, labels (i64[L], -100 before the answer).
    """
    if images is not None and len(images) > 1:
        raise ValueError(f"images: found {len(images)}; expected at most one image per conversation")
    prompt = render_prompt(query, template_version or config.template_version, history or ())
    num_image_tokens = config.num_patches + 2 if images else 0
    ids = [tokenizer.bos_token_id] + [config.pad_token_id or 0] * num_image_tokens
    types = [layout.LANGUAGE] + [layout.VISION] * num_image_tokens
    ids += tokenizer.encode(prompt, add_special_tokens=False)
    labels = [-100] * len(ids)
    if answer is not None:
        answer_ids = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
        ids, labels = ids + answer_ids, labels + answer_ids
    types += [layout.LANGUAGE] * (len(ids) - len(types))
    out: dict[str, Any] = {
        "input_ids": torch.tensor(ids),
        "token_type_ids": torch.tensor(types),
        "attention_mask": torch.ones(len(ids), dtype=torch.long),
        "images": [x if isinstance(x, Tensor) else preprocess_image(x, config.image_size) for x in images or []],
    }
    if answer is not None:
        out["labels"] = torch.tensor(labels)
    return out
