"""Scenes of coloured boxes at continuous places and sizes, and a tiny model that learns them in one process."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cogvlm_ft.data.encode import encode_turns
from cogvlm_ft.evaluate.generate import Answer, generate_answers
from cogvlm_ft.grounding.boxes import format_boxes
from cogvlm_ft.grounding.targets import Box, Target, Turn
from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer, preprocess_image
from cogvlm_ft.model.cogvlm import IGNORE_INDEX
from cogvlm_ft.model.demo_model import build_demo_model
from cogvlm_ft.model.layout import PAD_BLOCK
from cogvlm_ft.model.tokenizer import train_tokenizer

COLOURS = {
    "red": (214, 38, 40),
    "green": (40, 160, 60),
    "blue": (30, 80, 220),
    "yellow": (240, 200, 20),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
}
NOT_FOUND = "none"
MAX_NEW_TOKENS = 22
PEAK_RATE, WARM_UP = 2e-3, 0.05
TOKENS_PER_PASS = 32 * 29**2
"""Image tokens that are asked about together, at every resolution the same: 32 images of 232 px."""


@dataclass(frozen=True)
class Scene:
    """An image, and a box for each of its colours."""

    image: Image.Image
    targets: tuple[Target, ...]


def make_scene(
    rng: random.Random, side_px: int, sizes_px: tuple[float, float], num_targets: int, num_colours: int = len(COLOURS)
) -> Scene:
    """Draw boxes of different colours that do not touch, with edges at any whole pixel, on noisy grey."""
    noise = np.frombuffer(rng.randbytes(side_px**2), dtype=np.uint8).reshape(side_px, side_px, 1) % 12
    pixels = np.repeat(noise + np.uint8(112), 3, axis=2)
    targets: list[Target] = []
    for colour in rng.sample(sorted(COLOURS)[:num_colours], num_targets):
        box = _free_place(rng, side_px, sizes_px, [target.boxes_xyxy[0] for target in targets])
        x0, y0, x1, y1 = map(int, box)
        pixels[y0:y1, x0:x1] = COLOURS[colour]
        targets.append(Target(colour, "en", (box,)))
    return Scene(Image.fromarray(pixels), tuple(targets))


def _free_place(rng: random.Random, side_px: int, sizes_px: tuple[float, float], taken: Sequence[Box]) -> Box:
    while True:
        width, height = (round(rng.uniform(*sizes_px)) for _ in range(2))
        x0, y0 = rng.randint(0, side_px - width), rng.randint(0, side_px - height)
        box = float(x0), float(y0), float(x0 + width), float(y0 + height)
        if all(box[0] > b[2] + 1 or b[0] > box[2] + 1 or box[1] > b[3] + 1 or b[1] > box[3] + 1 for b in taken):
            return box


def turns_of(targets: Sequence[Target], size_px: tuple[int, int]) -> list[Turn]:
    """Return a question about each target; one without boxes is absent."""
    answers = [format_boxes(each.boxes_xyxy, size_px) if each.boxes_xyxy else NOT_FOUND for each in targets]
    return [Turn(f"{each.phrase}?", answer, each) for each, answer in zip(targets, answers, strict=True)]


def build_tokenizer() -> CogVLMTokenizer:
    """Train a tokenizer in which every digit, bracket, colour and "none" is a token."""
    texts = [f"{colour}?" for colour in COLOURS] * 20 + [NOT_FOUND] * 20
    texts += [format_boxes([(i % 500, i % 400, 999, 999)], (1000, 1000)) for i in range(400)]
    with TemporaryDirectory() as folder:
        train_tokenizer(texts, Path(folder) / "tokenizer.model", 300)
        return CogVLMTokenizer(Path(folder) / "tokenizer.model")


def build_model(tokenizer: CogVLMTokenizer, image_size: int, seed: int) -> CogVLMForCausalLM:
    """Build the random model of a rehearsal, of 1 million parameters."""
    torch.manual_seed(seed)
    return build_demo_model(len(tokenizer), image_size, small=True)


Shown = tuple[Image.Image, list[Turn]]
"""An image as it is shown, and the questions about it."""


class Trained(NamedTuple):
    """What a training took."""

    steps: int
    cpu_s: float


def train(
    model: CogVLMForCausalLM,
    tokenizer: CogVLMTokenizer,
    draw: Callable[[random.Random], Shown],
    *,
    seed: int,
    batch_size: int,
    num_steps: int,
    cpu_s: float | None = None,
) -> Trained:
    """Train with AdamW for `num_steps`; with `cpu_s`, for as many steps as that much CPU time allows instead."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    rng, start, step, done = random.Random(f"train:{seed}"), time.process_time(), 0, 0.0
    model.train()
    while done < 1:
        rate = PEAK_RATE * min(1.0, done / WARM_UP + 0.02) * (0.525 + 0.475 * float(np.cos(np.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        model(**_batch([draw(rng) for _ in range(batch_size)], tokenizer, model), return_logits=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        done = (time.process_time() - start) / cpu_s if cpu_s else step / num_steps
    return Trained(step, time.process_time() - start)


def _batch(shown: Sequence[Shown], tokenizer: CogVLMTokenizer, model: CogVLMForCausalLM) -> dict[str, Tensor]:
    rows = [encode_turns(turns, tokenizer, model.config) for _, turns in shown]
    padding = {"input_ids": 0, "labels": IGNORE_INDEX, "position_ids": 0, "block_ids": PAD_BLOCK}
    padded = {
        name: pad_sequence([getattr(row, name) for row in rows], batch_first=True, padding_value=value)
        for name, value in padding.items()
    }
    return {**padded, "pixel_values": _pixels([image for image, _ in shown], model)}


def _pixels(images: Sequence[Image.Image], model: CogVLMForCausalLM) -> Tensor:
    size = model.config.image_size
    resized = [image.resize((size, size), Image.Resampling.BICUBIC) for image in images]
    return torch.stack([preprocess_image(image, size) for image in resized])


def ask(
    model: CogVLMForCausalLM,
    tokenizer: CogVLMTokenizer,
    images: Sequence[Image.Image],
    phrases: Sequence[Sequence[str]],
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[list[Answer]]:
    """Return the answers about each image, as many images at a time as TOKENS_PER_PASS allows."""
    model.eval()
    found: list[list[Answer]] = []
    step = max(1, TOKENS_PER_PASS // model.config.num_patches)
    with torch.no_grad():
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            prompts = [[f"{phrase}?" for phrase in row] for row in phrases[part]]
            pixels = _pixels(images[part], model)
            found += generate_answers(model, tokenizer, pixels, prompts, max_new_tokens, not_found=[NOT_FOUND])
    return found
