"""Measure speed and memory of forward and backward on one CUDA GPU, with layers of the 17B model.

    python bench/gpu_speed.py [--precisions fp32 tf32 bf16] [--turns 1 8] [--image-sizes 490 980] [--rounds 10]
    python bench/gpu_speed.py --device cpu --tiny        tests the program without a GPU; ignore the figures

The model has a few language layers (hidden 4096, intermediate 11008) and vision layers (1792, 15360) of the 17B model,
with adaptor, embeddings and lm_head. The input is one image with K turns of 48 tokens. FLOPs are those of the model,
without recomputation: experts as routed, the vision tower once, causal attention halved, backward twice forward. MFU is
the fraction of the data sheet's dense peak; "of matmul" is the fraction of the speed of one large product in the same
run. The optimizer is not included, because in a training run it is partitioned over the GPUs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from gpu_lines import Line
from torch import nn

from cogvlm_ft.data.collate import Batch, Example, collate
from cogvlm_ft.data.encode import encode_turns
from cogvlm_ft.data.plan import Item
from cogvlm_ft.grounding.targets import Turn
from cogvlm_ft.model import CogVLMConfig, CogVLMForCausalLM, enable_gradient_checkpointing
from cogvlm_ft.model.layout import image_span
from cogvlm_ft.planning.activations import MicroBatchShape, peak_of, probe_stages
from cogvlm_ft.runtime.tf32 import allow_tf32

NUM_LANGUAGE_LAYERS, NUM_VISION_LAYERS = 2, 4  # close to the ratio of the model, 32 to 63
PROMPT_TOKENS, ANSWER_TOKENS = 24, 24
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
AIM_MFU = 0.5  # full fine-tuning of vision-language models on A800 GPUs is reported at 0.3 to 0.4
CHECKPOINTING = ("none", "all")
# Dense TFLOP/s from the data sheets, SXM versions. The first key contained in the name of the GPU is used.
DATA_SHEETS: dict[str, dict[str, float]] = {
    "H200": {"fp32": 67, "tf32": 495, "bf16": 989},
    "H100": {"fp32": 67, "tf32": 495, "bf16": 989},
    "A100": {"fp32": 19.5, "tf32": 156, "bf16": 312},
    "A800": {"fp32": 19.5, "tf32": 156, "bf16": 312},
    "H800": {"fp32": 67, "tf32": 495, "bf16": 989},
    "L40S": {"fp32": 91.6, "tf32": 183, "bf16": 362},
}


@dataclass(frozen=True)
class Case:
    precision: str
    image_size: int
    num_turns: int
    checkpointing: str


@dataclass(frozen=True)
class Measured:
    """One measured case.

    seconds: median of a step. flops: of the model. peak_bytes, activation_bytes: 0 on CPU, where they are not measured.
    activation_bytes: above weights and gradients. planned_bytes: the estimate of launch/plan.py for them.
    """

    seconds: float
    flops: float
    peak_bytes: int
    activation_bytes: int
    planned_bytes: int


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny layers and images")
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--turns", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--image-sizes", type=int, nargs="+", help="px (default: 490 980; with --tiny 28 56)")
    parser.add_argument("--checkpointing", nargs="+", default=list(CHECKPOINTING))
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench/gpu_speed.py: no CUDA GPU found; nothing was measured")
        return
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    config = tiny_config() if args.tiny else real_config()
    image_sizes = args.image_sizes or ([28, 56] if args.tiny else [490, 980])
    print(f"{name}, {config.num_hidden_layers} language and {config.vision['num_hidden_layers']} vision layers")
    for precision in args.precisions:
        with math_of(precision):
            model = build_model(config, device, DTYPES[precision])
            peak = matmul_flops_per_s(device, DTYPES[precision], 128 if args.tiny else 8192)
            print(f"{precision}: one large product {peak / 1e12:.2f} TFLOP/s", flush=True)
            for case in (Case(precision, *rest) for rest in product(image_sizes, args.turns, args.checkpointing)):
                report(case, measure_or_none(model, config, case, args.rounds), name, peak)
            del model


def real_config() -> CogVLMConfig:
    return CogVLMConfig(
        num_hidden_layers=NUM_LANGUAGE_LAYERS,
        template_version="base",
        vision_config={"num_hidden_layers": NUM_VISION_LAYERS},
    )


def tiny_config() -> CogVLMConfig:
    return CogVLMConfig(
        vocab_size=500,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        template_version="base",
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_heads": 2},
    )


@contextmanager
def math_of(precision: str) -> Iterator[None]:
    """Allow or forbid TF32 products, as train.tf32 does."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allow_tf32(precision == "tf32")
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def build_model(config: CogVLMConfig, device: torch.device, dtype: torch.dtype) -> CogVLMForCausalLM:
    torch.manual_seed(0)
    with torch.device(device):
        model = CogVLMForCausalLM(config)
    return nn.Module.to(model, dtype).train()


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype, size: int) -> float:
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / median_seconds(lambda: a @ b, device, 10)


def measure_or_none(model: CogVLMForCausalLM, config: CogVLMConfig, case: Case, rounds: int) -> Measured | None:
    """Measure a case; return None if it does not fit on the GPU."""
    try:
        return measure(model, config, case, rounds)
    except torch.OutOfMemoryError:
        return None
    finally:
        model.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(model: CogVLMForCausalLM, config: CogVLMConfig, case: Case, rounds: int) -> Measured:
    at_size = config.at_image_size(case.image_size)
    model = resized(model, at_size)
    layers: list[Any] = [*model.model.vision.transformer.layers, *model.model.layers]
    for layer in layers:
        layer.gradient_checkpointing = False
    enable_gradient_checkpointing(model, case.checkpointing)
    device = model.device
    batch = batch_of(at_size, case.num_turns).to(device)
    flops = step_flops(model, batch, at_size)

    def step() -> None:
        model.zero_grad(set_to_none=False)
        model(
            input_ids=batch.input_ids,
            pixel_values=batch.pixel_values.to(model.dtype),
            position_ids=batch.position_ids,
            block_ids=batch.block_ids,
            labels=batch.labels,
            return_logits=False,
        ).loss.backward()

    planned = planned_bytes(at_size, case)
    seconds = median_seconds(step, device, rounds)
    if device.type != "cuda":
        return Measured(seconds, flops, 0, 0, planned)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)  # weights and, after the first step, their gradients
    step()
    peak = torch.cuda.max_memory_allocated(device)
    return Measured(seconds, flops, peak, peak - held, planned)


def planned_bytes(config: CogVLMConfig, case: Case) -> int:
    """Return the peak that the planner estimates for activations and the current layer."""
    with torch.device("meta"):
        model = CogVLMForCausalLM(config)
    nn.Module.to(model, DTYPES[case.precision])
    enable_gradient_checkpointing(model, case.checkpointing)
    turn = PROMPT_TOKENS + ANSWER_TOKENS
    kept, working, _ = peak_of(probe_stages(model.train(), MicroBatchShape(1, case.num_turns, turn, ANSWER_TOKENS)))
    return kept + working


def resized(model: CogVLMForCausalLM, config: CogVLMConfig) -> CogVLMForCausalLM:
    """Change the image size: replace the position table, keep all other layers."""
    embedding = model.model.vision.patch_embedding
    old = embedding.position_embedding.weight
    table = nn.Embedding(config.vision["num_positions"], old.shape[1], device=old.device, dtype=old.dtype)
    embedding.position_embedding = table
    model.config = model.model.config = config
    return model


def batch_of(config: CogVLMConfig, num_turns: int) -> Batch:
    """Return a batch of one image with `num_turns` turns."""
    turns = [Turn(words(f"q{k}", PROMPT_TOKENS), words(f"a{k}", ANSWER_TOKENS - 1)) for k in range(num_turns)]
    image = torch.randn(config.vision["in_channels"], config.image_size, config.image_size)
    return collate(
        [
            Example(
                "photo", Item(0, 0, 1.0), image, encode_turns(turns, Words(config.vocab_size), config), 1.0, num_turns
            )
        ]
    )


def words(start: str, count: int) -> str:
    return " ".join(f"{start}-{i}" for i in range(count))


class Words:
    """A tokenizer that needs no file: every word is an id."""

    bos_token_id, eos_token_id = 1, 2

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [3 + hash(word) % (self.vocab_size - 3) for word in text.split()]


def step_flops(model: CogVLMForCausalLM, batch: Batch, config: CogVLMConfig) -> float:
    """Count FLOPs of forward and backward: 6 per weight and row, 12 per attention dimension and pair of positions."""
    linear = 0

    def count(module: nn.Linear, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        nonlocal linear
        linear += 6 * inputs[0].numel() * module.out_features

    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        model(
            input_ids=batch.input_ids,
            pixel_values=batch.pixel_values.to(model.dtype),
            position_ids=batch.position_ids,
            block_ids=batch.block_ids,
            labels=batch.labels,
            return_logits=False,
        )
    for hook in hooks:
        hook.remove()
    vision, (_, prefix) = config.vision, image_span(config.num_patches)
    patches = 6 * config.num_patches * vision["in_channels"] * vision["patch_size"] ** 2 * vision["hidden_size"]
    seen = vision["num_hidden_layers"] * vision["hidden_size"] * (config.num_patches + 1) ** 2
    text = batch.input_ids.shape[1] - prefix
    pairs = prefix**2 / 2 + text * prefix + text * (PROMPT_TOKENS + ANSWER_TOKENS) / 2
    return linear + patches + 12 * (seen + config.num_hidden_layers * config.hidden_size * pairs)


def median_seconds(action: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Return the median seconds of a call, after two warm-up calls."""
    times = []
    for number in range(rounds + 2):
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        if number >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_mfu(setup: Any) -> list[Line]:
    """Measure K = 1 and 8 at 490 and 980 px in bf16, with all layers recomputed: a part of bench/gpu.py."""
    config = tiny_config() if setup.tiny else real_config()
    device = torch.device(setup.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    lines = []
    with math_of("bf16"):
        model = build_model(config, device, torch.bfloat16)
        for image_size, num_turns in product((28, 56) if setup.tiny else (490, 980), (1, 8)):
            case = Case("bf16", image_size, num_turns, "all")
            measured = measure_or_none(model, config, case, 1 if setup.tiny else 10)
            title = f"MFU at {image_size} px, K = {num_turns}"
            if measured is None:
                lines.append(Line(title, False, "does not fit"))
                continue
            per_s, sheet = measured.flops / measured.seconds, sheet_flops_per_s(name, "bf16")
            mfu = per_s / sheet if sheet else 0.0
            found = (
                f"{mfu:.2f}, expected at least {AIM_MFU}; {measured.seconds * 1e3:.1f} ms, {per_s / 1e12:.2f} TFLOP/s"
            )
            planned = measured.activation_bytes / measured.planned_bytes
            lines.append(Line(title, mfu >= AIM_MFU or not sheet, f"{found}, memory {planned:.2f} times the estimate"))
    return lines


def sheet_flops_per_s(gpu: str, precision: str) -> float | None:
    """Return the data sheet's peak of a GPU, None if it is not listed."""
    return next((1e12 * peaks[precision] for name, peaks in DATA_SHEETS.items() if name in gpu), None)


def report(case: Case, measured: Measured | None, gpu: str, matmul_peak: float) -> None:
    start = f"  {case.image_size} px, K = {case.num_turns}, checkpointing {case.checkpointing:<9}"
    if measured is None:
        print(f"{start} does not fit", flush=True)
        return
    per_s = measured.flops / measured.seconds
    sheet = sheet_flops_per_s(gpu, case.precision)
    mfu = "-" if sheet is None else f"{per_s / sheet:.2f}"
    line = (
        f"{start} {measured.seconds * 1e3:8.1f} ms, {case.num_turns / measured.seconds:7.1f} turns/s, "
        f"{per_s / 1e12:7.2f} TFLOP/s, MFU {mfu}, of matmul {per_s / matmul_peak:.2f}"
    )
    planned = f"estimated {measured.planned_bytes / 2**30:.3f} GiB"
    if measured.peak_bytes:
        line += f", peak {measured.peak_bytes / 2**30:.2f} GiB, activations {measured.activation_bytes / 2**30:.3f}"
        planned += f" (measured: {measured.activation_bytes / measured.planned_bytes:.2f} times that)"
    print(f"{line}, {planned}", flush=True)


if __name__ == "__main__":
    main()
