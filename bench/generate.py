"""Compare answering K questions about an image together with answering them one at a time.

    python bench/generate.py [--turns 1 8] [--images 1] [--new-tokens 32] [--rounds 3] [--threads 2]

Both sides use the same weights, decode greedily with a cache in fp32, and alternate. One at a time, each question has
its own pass over image and prompt, then one pass per new token. Prints ratios, the number of equal answers, and the
size of the KV cache on both sides if all questions of an image are answered at the same time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from train_step import CONFIG  # the same model in both benchmarks
from transformers.cache_utils import DynamicCache

from cogvlm_ft.evaluate.generate import generate_answers
from cogvlm_ft.model import CogVLMForCausalLM

PREFIX = CONFIG.num_patches + 3
PROMPT_TOKENS = 16


class Numbers:
    """A tokenizer that needs no file: a text is its ids. No token is eos."""

    bos_token_id, eos_token_id = 1, -1
    digits = {3 + digit: digit for digit in range(10)}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = CogVLMForCausalLM(CONFIG).eval().requires_grad_(False)
    for num_turns in args.turns:
        compare(model, args.images, num_turns, args.new_tokens, args.rounds)


def compare(model: CogVLMForCausalLM, num_images: int, num_turns: int, num_new: int, rounds: int) -> None:
    pixels = torch.randn(num_images, 3, CONFIG.image_size, CONFIG.image_size)
    ids = torch.randint(3, CONFIG.vocab_size, (num_images, num_turns, PROMPT_TOKENS)).tolist()
    sides: dict[str, Callable[[], list[list[list[int]]]]] = {
        "together": lambda: together(model, pixels, ids, num_new),
        "alone": lambda: [
            [alone(model, image[None], prompt, num_new) for prompt in prompts]
            for image, prompts in zip(pixels, ids, strict=True)
        ],
    }
    answers: dict[str, list[list[list[int]]]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            answers[name] = side()
            seconds[name].append(time.perf_counter() - start)
    num_answers = num_images * num_turns
    shared, plain = (num_answers / statistics.median(seconds[name]) for name in sides)
    pairs = [pair for rows in zip(*answers.values(), strict=True) for pair in zip(*rows, strict=True)]
    num_equal = sum(a == b for a, b in pairs)
    print(f"images: {num_images}, K = {num_turns} turns each, {num_new} new tokens per turn")
    print(f"  turns per second   {shared / plain:.2f} x ({shared:.2f} / {plain:.2f})")
    print(f"  answers equal      {num_equal} of {num_answers}")
    slots = PREFIX + num_turns * (PROMPT_TOKENS + num_new), num_turns * (PREFIX + PROMPT_TOKENS + num_new)
    mib = [2 * 4 * CONFIG.num_hidden_layers * CONFIG.hidden_size * n * num_images / 2**20 for n in slots]
    print(f"  KV cache           {mib[0] / mib[1]:.2f} x ({mib[0]:.0f} / {mib[1]:.0f} MiB)", flush=True)


def together(
    model: CogVLMForCausalLM, pixels: Tensor, ids: Sequence[Sequence[list[int]]], num_new: int
) -> list[list[list[int]]]:
    prompts = [[" ".join(map(str, prompt)) for prompt in row] for row in ids]
    answers = generate_answers(model, Numbers(), pixels, prompts, num_new)  # type: ignore[arg-type]
    return [[list(answer.token_ids) for answer in row] for row in answers]


def alone(model: CogVLMForCausalLM, pixels: Tensor, prompt: list[int], num_new: int) -> list[int]:
    cache = DynamicCache(config=CONFIG)
    inputs = torch.tensor([[1] + [0] * (PREFIX - 1) + prompt])
    out = model(input_ids=inputs, pixel_values=pixels, past_key_values=cache, use_cache=True, logits_to_keep=1)
    new_ids: list[int] = []
    for position in range(4 + len(prompt), 4 + len(prompt) + num_new):
        new_ids.append(int(out.logits[0, -1].argmax()))
        if len(new_ids) < num_new:
            out = model(
                input_ids=torch.tensor([new_ids[-1:]]),
                position_ids=torch.tensor([[position]]),
                past_key_values=cache,
                use_cache=True,
            )
    return new_ids


if __name__ == "__main__":
    main()
