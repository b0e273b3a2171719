"""Measure on every rank what an engine holds after training steps, in bytes, as one line of JSON.

Usage: memory_peaks.py SIZE IMAGES PRECISION CHECKPOINTING DEEPSPEED; SIZE is tiny or middle.

Freed tensors leave the process at once, so that resident memory is live memory.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import odd_config
from torch import Tensor
from transformers import initialization

from cogvlm_ft.config import load_config
from cogvlm_ft.model import CogVLMConfig, CogVLMForCausalLM, enable_gradient_checkpointing
from cogvlm_ft.model.layout import build_layout
from cogvlm_ft.planning.activations import MicroBatchShape
from cogvlm_ft.runtime.distributed import init_distributed, rank, shut_down, world_size
from cogvlm_ft.runtime.engine import build_engine, deepspeed_settings, partitioned
from cogvlm_ft.settings import Config

SIZES = {
    "tiny": odd_config(vocab_size=401, num_hidden_layers=3, max_position_embeddings=2048),
    "middle": CogVLMConfig(
        vocab_size=8000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=3,
        num_attention_heads=8,
        vision_config=dict(
            hidden_size=448, intermediate_size=3840, num_hidden_layers=3, num_heads=7, image_size=336, num_positions=577
        ),
    ),
}
# Optimizer states are made in the first step. Several ranks fetch ahead from the third on.
NUM_WARM_STEPS, NUM_WARM_STEPS_ALONE = 3, 1
M_MMAP_THRESHOLD, MAPPED_BYTES = -3, 1 << 16  # malloc.h: larger blocks are mapped, and unmapped when they are freed


def settings(num_images: int, precision: str, checkpointing: str, deepspeed: str, num_ranks: int) -> Config:
    given = [f"train.micro_batch_size={num_images}", f"train.global_batch_size={num_images * num_ranks}"]
    given += [f"train.precision={precision}", f"model.gradient_checkpointing={checkpointing}"]
    return load_config(None, ["model.path=m", "data.shards=s", "output_dir=o", f"deepspeed={deepspeed}", *given])


def main() -> None:
    size, num_images, precision, checkpointing, deepspeed = sys.argv[1:]
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
    init_distributed()
    config = settings(int(num_images), precision, checkpointing, deepspeed, world_size())
    engine = engine_of(SIZES[size], config)
    batch = batch_of(engine.module.config, MicroBatchShape(num_images=int(num_images)))
    counter = GatheredNow(engine)
    for _ in range(NUM_WARM_STEPS if world_size() > 1 else NUM_WARM_STEPS_ALONE):
        step(engine, batch)
    measured = {**persistent_bytes(engine.optimizer), "gathered": counter.peak, **transient_bytes(engine, batch)}
    if rank() == 0:
        print(json.dumps({"measured": measured}), flush=True)
    shut_down()


def engine_of(model_config: CogVLMConfig, config: Config) -> Any:
    torch.manual_seed(0)
    ready = deepspeed_settings(config)
    with initialization.no_init_weights(), partitioned(ready):
        model = CogVLMForCausalLM(model_config)
    parts: list[Any] = list(model.parameters())
    for parameter in parts:
        parameter.ds_tensor.data.normal_(std=0.02)
    enable_gradient_checkpointing(model, config.model.gradient_checkpointing)
    return build_engine(model, config, ready)


def batch_of(config: CogVLMConfig, sequences: MicroBatchShape) -> dict[str, Any]:
    """Return random tokens and images, every turn with its labels at the end."""
    layout = build_layout(config.num_patches, [sequences.turn_tokens] * sequences.turns)
    shape = (sequences.num_images, len(layout.block_ids))
    ids = torch.randint(3, config.vocab_size, shape)
    labels = torch.full(shape, -100)
    for turn in range(sequences.turns):
        stop = config.num_patches + 3 + (turn + 1) * sequences.turn_tokens
        labels[:, stop - sequences.labelled_tokens : stop] = ids[:, stop - sequences.labelled_tokens : stop]
    pixels = torch.randn(sequences.num_images, 3, config.image_size, config.image_size)
    positions, blocks = (part.expand(shape).contiguous() for part in (layout.position_ids, layout.block_ids))
    return dict(input_ids=ids, pixel_values=pixels, position_ids=positions, block_ids=blocks, labels=labels)


def step(engine: Any, batch: dict[str, Any]) -> None:
    engine.backward(engine(**batch, return_logits=False).loss)
    engine.step()


class GatheredNow:
    """Track the largest number of elements gathered at once after the warm-up, without persistent parameters."""

    def __init__(self, engine: Any) -> None:
        self.peak, self._parameters = 0, list(engine.module.parameters())
        coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        fetch = coordinator.fetch_sub_module

        def fetch_and_count(module: Any, forward: bool) -> None:
            fetch(module, forward)
            there = (p for p in self._parameters if p.ds_status.name != "NOT_AVAILABLE" and not p.ds_persist)
            self.peak = max(self.peak, sum(p.ds_numel for p in there)) if coordinator.is_complete_trace() else 0

        coordinator.fetch_sub_module = fetch_and_count


def persistent_bytes(optimizer: Any) -> dict[str, int]:
    """Return the bytes of persistent tensors; two names of one memory count once."""
    weights = [p.ds_tensor for group in optimizer.fp16_groups for p in group]
    masters = [part for part in optimizer.fp32_partitioned_groups_flat if not shares_memory(part, weights)]
    moments = [s[name] for s in optimizer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return {
        "weights": sum(part.nbytes for part in weights),
        "gradients": optimizer.grad_partitions_flat_buffer.nbytes,
        "master weights": sum(part.nbytes for part in masters),
        "Adam": sum(part.nbytes for part in moments),
    }


def shares_memory(part: Tensor, others: list[Tensor]) -> bool:
    return part.untyped_storage().data_ptr() in {other.untyped_storage().data_ptr() for other in others}


def transient_bytes(engine: Any, batch: dict[str, Any]) -> dict[str, int]:
    """Return resident memory beyond that before the step: after the forward pass, and at most until backward ends."""
    gc.collect()
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    loss = engine(**batch, return_logits=False).loss
    kept = resident_bytes("VmRSS") - before
    engine.backward(loss)
    return {"kept": kept, "peak": resident_bytes("VmHWM") - before}


def resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


if __name__ == "__main__":
    main()
