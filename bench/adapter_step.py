"""Compare a training step of adapters with one of all parameters: turns per second and peak memory.

    python bench/adapter_step.py [--turns 1 8] [--rank 16] [--rounds 3] [--threads 2]

The model and the samples are those of bench/train_step.py: one image with K turns. A step is forward, backward and an
update by AdamW, in fp32, without recomputation. The steps alternate; the memory of each is measured in a process of its
own, above that of the frozen or not yet trained weights.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from train_step import ANSWER_TOKENS, CONFIG, PROMPT_TOKENS, batch_of, resident_mib, shared_loss, words

from cogvlm_ft.adapter_settings import AdapterConfig
from cogvlm_ft.data.collate import Batch
from cogvlm_ft.grounding.targets import Turn
from cogvlm_ft.model import CogVLMForCausalLM
from cogvlm_ft.model.adapters import add_adapters


class Training:
    """A model and the optimizer of its trainable parameters."""

    def __init__(self, model: CogVLMForCausalLM) -> None:
        self.model = model
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)

    def step(self, batch: Batch) -> float:
        """Train on a batch and return the seconds it took."""
        start = time.perf_counter()
        shared_loss(self.model, batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a process that has used several cannot be forked
    torch.manual_seed(0)
    whole = CogVLMForCausalLM(CONFIG)
    adapted = copy.deepcopy(whole)
    add_adapters(adapted, AdapterConfig(rank=args.rank, alpha=2.0 * args.rank), seed=0)
    models: dict[str, nn.Module] = {"full": whole, "LoRA": adapted}
    peaks = {(k, name): peak_mib(model, k, args.threads) for k in args.turns for name, model in models.items()}
    torch.set_num_threads(args.threads)
    trainings = {name: Training(model) for name, model in models.items()}
    counts = {name: sum(map(torch.Tensor.numel, training.trained)) for name, training in trainings.items()}
    print(f"LoRA of rank {args.rank}: {100 * counts['LoRA'] / counts['full']:.1f} % of the parameters")
    for k in args.turns:
        batch = batch_of_turns(k)
        times: dict[str, list[float]] = {name: [] for name in trainings}
        for _ in range(1 + args.rounds):  # the first fills the optimizer
            for name, training in trainings.items():
                times[name].append(training.step(batch))
        full, lora = (statistics.median(times[name][1:]) for name in ("full", "LoRA"))
        print(f"K = {k}: turns per second {full / lora:.2f} x ({k / lora:.2f} / {k / full:.2f})", flush=True)
        most, least = peaks[k, "full"], peaks[k, "LoRA"]
        print(f"       peak memory {least / most:.2f} x ({least:.0f} / {most:.0f} MiB above the weights)", flush=True)


def batch_of_turns(num_turns: int) -> Batch:
    """Return one image with that many turns."""
    turns = [Turn(words(f"q{k}", PROMPT_TOKENS), words(f"a{k}", ANSWER_TOKENS - 1)) for k in range(num_turns)]
    return batch_of(torch.randn(3, CONFIG.image_size, CONFIG.image_size), [turns])


def peak_mib(model: nn.Module, num_turns: int, num_threads: int) -> float:
    """Return the peak resident memory of two steps above that before, in a forked process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(model, num_turns, num_threads, sender))
    process.start()
    sender.close()
    peak: float = receiver.recv()
    process.join()
    return peak


def _measure(model: CogVLMForCausalLM, num_turns: int, num_threads: int, sender: object) -> None:
    torch.set_num_threads(num_threads)
    training, batch = Training(model), batch_of_turns(num_turns)
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    for _ in range(2):
        training.step(batch)
    sender.send(resident_mib("VmHWM") - before)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
