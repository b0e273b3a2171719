"""A random model with the sizes of CogVLM-17B in bf16: write, load, ask, evaluate on images with many turns."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_lines import Line, at_most
from gpu_small_run import IMAGE_SIZE, TEXTS, small_config, write_shards
from PIL import Image
from torch import Tensor

from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.evaluate.evaluate import evaluate
from cogvlm_ft.model import CogVLMConfig, CogVLMForCausalLM, CogVLMTokenizer
from cogvlm_ft.model.loading import save_weights
from cogvlm_ft.model.tokenizer import MODEL_FILE, train_tokenizer
from cogvlm_ft.predict.predictor import Asking, load_predictor
from cogvlm_ft.settings import EvaluateConfig
from cogvlm_ft.shards.demo_scenes import write_scenes

GIB = 2**30
NUM_IMAGES, TURNS, NEW_TOKENS = 8, (4, 16, 30), 32
BLOCK_NUMEL = 2**22 + 1  # odd, so that no two rows of a matrix are equal
LOAD_LIMIT_S, HOST_FACTOR = 240.0, 1.3  # of the bytes of the weights


@dataclass(frozen=True)
class RandomTensor:
    """A tensor that repeats a block of random numbers: to draw 17 billion on one core takes minutes."""

    shape: torch.Size
    block: Tensor

    def read(self, start: int, stop: int) -> Tensor:
        size = len(self.block)
        whole, rest = divmod(stop - start, size)
        return torch.cat([self.block] * whole + [self.block[:rest]])


def write_model(setup: Any) -> list[Line]:
    folder, start = setup.out / "17b", time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    train_tokenizer(TEXTS, setup.out / MODEL_FILE, vocab_size=360)
    tokenizer = CogVLMTokenizer.from_folder(setup.out)
    tokenizer.save(folder)
    # The sizes of the 17B model but for the vocabulary, which is that of the tokenizer: 17.4 billion parameters.
    config = CogVLMConfig(vocab_size=len(tokenizer)) if not setup.tiny else small_config(len(tokenizer), tiny=True)
    with torch.device("meta"):
        model = CogVLMForCausalLM(config)
    config.save_pretrained(folder)
    block = torch.empty(BLOCK_NUMEL, dtype=torch.bfloat16).normal_(std=0.02)
    tensors = [(name, RandomTensor(parameter.shape, block)) for name, parameter in model.named_parameters()]
    save_weights(folder, tensors, torch.bfloat16)
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    seconds = time.perf_counter() - start
    found = f"{num_bytes / 1e9:.1f} GB in {seconds:.0f} s, {num_bytes / 1e9 / seconds:.2f} GB/s"
    return [Line("written", num_bytes >= 2 * sum(tensor.shape.numel() for _, tensor in tensors), found)]


def use_model(setup: Any) -> list[Line]:
    """Load, predict, and evaluate with more and more turns per image."""
    folder = setup.out / "17b"
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    before, start = host_peak(), time.perf_counter()
    predictor = load_predictor(folder, Asking(dtype="bf16", max_new_tokens=NEW_TOKENS))
    if setup.device == "cuda":
        torch.cuda.synchronize()
    lines = [at_most("loaded", time.perf_counter() - start, LOAD_LIMIT_S, " s")]
    limit = HOST_FACTOR * num_bytes / GIB + (1 if setup.tiny else 0)
    lines.append(at_most("host memory of loading", (host_peak() - before) / GIB, limit, " GiB"))
    [[reply]] = timed(lines, "predicted", lambda: predictor.ask([Image.new("RGB", (640, 480), "red")], [["dog"]]))
    lines.append(Line("an answer", bool(reply.prompt), repr(reply.text[:40])))
    for turns in TURNS[:2] if setup.tiny else TURNS:
        reader = ShardReader(load_index(shards_with(setup.out, turns), "val"))
        settings = dataclasses.replace(EvaluateConfig(), max_new_tokens=NEW_TOKENS, batch_size=NUM_IMAGES)
        if setup.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found = timed(
            lines,
            f"evaluated, {turns} turns per image",
            lambda reader=reader, settings=settings: evaluate(
                predictor.model, predictor.tokenizer, reader, predictor.wording, settings, seed=0
            ),
        )
        peak = torch.cuda.max_memory_allocated() / GIB if setup.device == "cuda" else 0.0
        answered = f"{len(found.predictions)} answers, expected {NUM_IMAGES * turns}; {peak:.1f} GiB at the peak"
        lines.append(Line(f"answers, {turns} turns per image", len(found.predictions) == NUM_IMAGES * turns, answered))
    return lines


def timed(lines: list[Line], name: str, work: Any) -> Any:
    """Do the work and add a line with its seconds."""
    start = time.perf_counter()
    result = work()
    lines.append(Line(name, True, f"{time.perf_counter() - start:.1f} s"))
    return result


def host_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def shards_with(out: Path, num_turns: int) -> Path:
    """Return shards whose 8 validation images have that many turns each."""
    folder = out / f"turns-{num_turns}"
    if (folder / "shards" / "index.json").exists():
        return folder / "shards"
    annotations = write_scenes(folder / "scenes", 4 * NUM_IMAGES, IMAGE_SIZE, seed=num_turns)
    rows = [json.loads(line) for line in annotations.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["targets"] = []
        row["turns"] = [{"prompt": f"dog {n}", "answer": f"{n}"} for n in range(num_turns)]
    annotations.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_shards(annotations, folder / "shards")
    return folder / "shards"
