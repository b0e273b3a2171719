"""A random CogVLM of the published architecture that learns a few photos in minutes, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from cogvlm_ft.data.look import turns_of
from cogvlm_ft.data.record import Record
from cogvlm_ft.grounding.wording import Wording
from cogvlm_ft.model import CogVLMTokenizer
from cogvlm_ft.model.demo_model import build_demo_model
from cogvlm_ft.model.tokenizer import MODEL_FILE, train_tokenizer

IMAGE_SIZE = 64  # px: enough to tell a few photos apart, and most of a step is spent on text
VOCAB_SIZE = 420  # of which 259 are bytes and control tokens: words of few texts stay tokens, others can be read too
EPOCHS_READ = 20  # whose texts the tokenizer is trained on: the wording changes from epoch to epoch


def texts_of(records: Iterable[Record], wording: Wording, seed: int, num_epochs: int = EPOCHS_READ) -> list[str]:
    """Return the prompts and answers of the records, in the wording of several epochs."""
    return [
        text
        for record in records
        for epoch in range(num_epochs)
        for turn in turns_of(record, wording, seed=seed, epoch=epoch)
        for text in (turn.prompt, turn.answer)
    ]


def save_tiny_model(folder: Path, texts: Sequence[str], image_size: int = IMAGE_SIZE, *, small: bool = False) -> int:
    """Save a model with random parameters and a tokenizer trained on the texts. Return its number of parameters.

    small: half the parameters, enough to memorize a few photos.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(texts, folder / MODEL_FILE, VOCAB_SIZE)
    tokenizer = CogVLMTokenizer.from_folder(folder)
    tokenizer.save(folder)
    torch.manual_seed(0)
    longest = max(len(tokenizer.encode(text)) for text in texts)
    model = build_demo_model(len(tokenizer), image_size, max_positions=max(256, 4 * longest), small=small)
    disable_progress_bar()  # of transformers, for a file of a few MB
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())
