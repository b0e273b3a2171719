"""Compare a training step that shares one image prefix among K turns with one sequence per turn.

    python bench/train_step.py [--turns 1 8] [--rounds 3] [--threads 2]

Both sides use the same weights and samples and alternate. The plain side does what the published code does: it marks
images with a boolean mask, masks padding with a dense [L, L] mask and computes all logits. Forward and backward are
timed in fp32. Prints ratios, the peak memory above the weights, and the fraction of the speed that this machine reaches
in matrix products of the same shapes.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from cogvlm_ft.data.collate import Batch, Example, collate
from cogvlm_ft.data.encode import encode_turns
from cogvlm_ft.data.plan import Item
from cogvlm_ft.grounding.targets import Turn
from cogvlm_ft.model import CogVLMConfig, CogVLMForCausalLM
from cogvlm_ft.model.layout import LANGUAGE, VISION, image_span

CONFIG = CogVLMConfig(
    vocab_size=32000,
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=6,
    num_attention_heads=8,
    template_version="base",
    vision_config={"hidden_size": 448, "intermediate_size": 3840, "num_hidden_layers": 6, "num_heads": 7},
)
PROMPT_TOKENS, ANSWER_TOKENS = 24, 24


class Words:
    """A tokenizer that needs no file: every word is an id."""

    bos_token_id, eos_token_id = 1, 2

    def encode(self, text: str) -> list[int]:
        return [3 + hash(word) % (CONFIG.vocab_size - 3) for word in text.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = CogVLMForCausalLM(CONFIG)
    for num_turns in args.turns:
        compare(model, num_turns, args.rounds)


def compare(model: CogVLMForCausalLM, num_turns: int, rounds: int) -> None:
    turns = [Turn(words(f"q{k}", PROMPT_TOKENS), words(f"a{k}", ANSWER_TOKENS - 1)) for k in range(num_turns)]
    image = torch.randn(3, CONFIG.image_size, CONFIG.image_size)
    together, apart = batch_of(image, [turns]), batch_of(image, [[turn] for turn in turns])
    sides: dict[str, Callable[[], Tensor]] = {
        "shared": lambda: shared_loss(model, together),
        "plain": lambda: plain_loss(model, apart),
    }
    losses = {name: float(side().detach()) for name, side in sides.items()}
    difference = abs(losses["shared"] / losses["plain"] - 1)
    memory = {name: peak_mib(model, side) for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name].append(time_of(model, side))
    shared, plain = (statistics.median(seconds[name]) for name in ("shared", "plain"))
    print(f"K = {num_turns}: {together.num_tokens} tokens in one sequence, {apart.num_tokens} in separate sequences")
    print(f"  turns per second   {plain / shared:.2f} x ({num_turns / shared:.2f} / {num_turns / plain:.2f})")
    print(f"  peak memory        {memory['shared'] / memory['plain']:.2f} x ({memory['shared']:.0f} MiB)")
    print(f"  loss               relative difference {difference:.1e}")
    fraction, gflops = fraction_of_peak(model, sides["shared"], together, shared)
    print(f"  of matmul peak     {fraction:.2f} ({gflops:.0f} GFLOP/s at the shapes of the step)", flush=True)


def words(start: str, count: int) -> str:
    return " ".join(f"{start}-{i}" for i in range(count))


def batch_of(image: Tensor, rows: list[list[Turn]]) -> Batch:
    return collate(
        [
            Example(str(i), Item(0, i, 1.0), image, encode_turns(row, Words(), CONFIG), 1.0, len(row))
            for i, row in enumerate(rows)
        ]
    )


def shared_loss(model: CogVLMForCausalLM, batch: Batch) -> Tensor:
    """Compute the loss as train/step.py does."""
    return model(
        input_ids=batch.input_ids,
        pixel_values=batch.pixel_values,
        position_ids=batch.position_ids,
        block_ids=batch.block_ids,
        labels=batch.labels,
        return_logits=False,
    ).loss


def plain_loss(model: CogVLMForCausalLM, batch: Batch) -> Tensor:
    """Compute the loss through the published interface."""
    token_type_ids = torch.full_like(batch.input_ids, LANGUAGE)
    token_type_ids[:, slice(*image_span(CONFIG.num_patches))] = VISION
    return model(
        input_ids=batch.input_ids,
        images=[[image] for image in batch.pixel_values],
        token_type_ids=token_type_ids,
        attention_mask=(batch.block_ids >= 0).long(),
        labels=batch.labels,
    ).loss


def time_of(model: nn.Module, side: Callable[[], Tensor]) -> float:
    model.zero_grad(set_to_none=False)
    start = time.perf_counter()
    side().backward()
    return time.perf_counter() - start


def peak_mib(model: nn.Module, side: Callable[[], Tensor]) -> float:
    """Return the peak resident memory above the weights and their gradients."""
    time_of(model, side)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    time_of(model, side)
    return resident_mib("VmHWM") - before


def resident_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def fraction_of_peak(
    model: CogVLMForCausalLM, side: Callable[[], Tensor], batch: Batch, seconds: float
) -> tuple[float, float]:
    """Return (FLOP/s of the step / FLOP/s of its matrix products alone, the latter in GFLOP/s).

    Each linear layer counts three times (output, gradient of input, gradient of weight); attention its causal half.
    """
    shapes: Counter[tuple[int, int, int]] = Counter()
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, _: shapes.update([(inputs[0].numel() // module.in_features, *module.weight.shape)])
        )
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    side()
    for hook in hooks:
        hook.remove()
    linear = sum(6 * rows * out * size * count for (rows, out, size), count in shapes.items())
    alone = sum(matmul_seconds(*shape) * count for shape, count in shapes.items())
    peak = linear / alone
    return (linear + attention_flops(batch)) / seconds / peak, peak / 1e9


def matmul_seconds(rows: int, out: int, size: int) -> float:
    """Time forward and backward of one linear layer; the best of five."""
    x, w, g = torch.randn(rows, size), torch.randn(out, size), torch.randn(rows, out)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        x @ w.T, g @ w, g.T @ x
        times.append(time.perf_counter() - start)
    return min(times)


def attention_flops(batch: Batch) -> float:
    """Count 12 per pair of positions and dimension: 2 products forward, 4 backward, 2 operations each."""
    vision, prefix, length = CONFIG.vision, CONFIG.num_patches + 3, batch.input_ids.shape[1]
    pairs = prefix**2 / 2 + (length - prefix) * prefix
    return 12 * (
        vision["num_hidden_layers"] * vision["hidden_size"] * (CONFIG.num_patches + 1) ** 2
        + CONFIG.num_hidden_layers * CONFIG.hidden_size * pairs
    )


if __name__ == "__main__":
    main()
