"""Compare saving a checkpoint with plain writing of the same bytes, and time how long training pauses.

    python bench/checkpoint.py [--mib 512] [--ranks 2] [--rounds 3] [--folder runs/disk]

Real ranks with a ZeRO-3 engine, fp32 weights of the given size and Adam's moments (twice as much) save a checkpoint
with checkpoint.background=false (hashed, synced, published) and with true. "plain" is the speed of the disk: the same
bytes from memory in 16 MiB parts and one fsync, on all ranks at once. "stall" is the pause of training, for the copy
into host memory. The first background save allocates that memory and later ones reuse it; both are printed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from loading import count_bytes, model_config
from transformers import initialization

from cogvlm_ft.checkpoints.checkpoint import TrainState
from cogvlm_ft.checkpoints.saver import CheckpointSaver
from cogvlm_ft.checkpoints.slices import local_specs
from cogvlm_ft.config import load_config
from cogvlm_ft.model import CogVLMForCausalLM
from cogvlm_ft.runtime.distributed import barrier, init_distributed, is_main, rank, shut_down
from cogvlm_ft.runtime.engine import build_engine, deepspeed_settings, partitioned
from cogvlm_ft.safetensors_io import CHUNK_BYTES
from cogvlm_ft.settings import CheckpointConfig

IMAGE_PX = 56


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="size of the fp32 weights; a checkpoint has 3 times that")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure (default: a temporary folder)")
    args = parser.parse_args()
    if "RANK" in os.environ:
        return measure(args.folder, args.mib << 20, args.rounds)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
        ours = [__file__, "--mib", args.mib, "--rounds", args.rounds, "--folder", folder]
        code = subprocess.run([*launcher, *map(str, ours)], env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    sys.exit(code)


def measure(folder: Path, weight_bytes: int, rounds: int) -> None:
    """Measure all ways of saving; collective."""
    init_distributed()
    engine = make_engine(folder, weight_bytes)
    num_bytes = sum(spec.num_bytes for spec in local_specs(engine))
    content = memoryview(torch.randint(256, (num_bytes,), dtype=torch.uint8).numpy().data)
    savers = {way: make_saver(engine, folder / way, way == "background") for way in ("blocking", "background")}
    seconds: dict[str, list[float]] = {way: [] for way in ("plain", "blocking", "background", "stall")}
    ways = ["plain", "blocking", "background"]
    for step in range(1, rounds + 1):
        ways = [*ways[1:], ways[0]]  # a different one is first in each round
        for way in ways:
            remove(folder)
            if way == "plain":
                seconds[way].append(timed(lambda: write_plainly(folder / f"plain-{rank()}", content)))
                continue
            first = timed(lambda way=way, step=step: savers[way].start(TrainState(step=step)))
            seconds[way].append(first + timed(savers[way].finish))
            seconds["stall"] += [first] if way == "background" else []
    remove(folder)
    if is_main():
        report(seconds, num_bytes)
    shut_down()


def make_engine(folder: Path, weight_bytes: int) -> Any:
    """Build an engine with random weights, and with Adam's moments after one step."""
    sizes = [count_bytes(model_config(512, num_layers)) for num_layers in (1, 2)]
    config = model_config(512, max(1, 1 + round((weight_bytes - sizes[0]) / (sizes[1] - sizes[0]))))
    config = config.at_image_size(IMAGE_PX)
    settings = ["model.path=unused", "data.shards=unused", f"output_dir={folder}", "train.global_batch_size=64"]
    run_config = load_config(None, settings)
    engine_settings = deepspeed_settings(run_config)
    with initialization.no_init_weights(), partitioned(engine_settings):
        model = CogVLMForCausalLM(config)
    for parameter in model.parameters():
        parameter.ds_tensor.data.normal_(0, 0.02)  # type: ignore[attr-defined]
    engine = build_engine(model, run_config, engine_settings)
    ids = torch.arange(3, 13)[None]
    types = torch.tensor([[0] + [1] * (config.num_patches + 2) + [0] * 9])
    padded = torch.cat([ids[:, :1], torch.full((1, config.num_patches + 2), 2), ids[:, 1:]], dim=1)
    while not engine.optimizer.optimizer.state:
        loss = engine(
            input_ids=padded,
            token_type_ids=types,
            attention_mask=torch.ones_like(padded),
            images=[[torch.zeros(3, IMAGE_PX, IMAGE_PX)]],
            labels=padded,
        ).loss
        engine.backward(loss)
        engine.step()
    return engine


def make_saver(engine: Any, folder: Path, background: bool) -> CheckpointSaver:
    return CheckpointSaver(engine, folder, lambda _: None, CheckpointConfig(background=background, keep_last=1))


def write_plainly(path: Path, content: memoryview) -> None:
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(content), CHUNK_BYTES):
            file.write(content[start : start + CHUNK_BYTES])
        os.fsync(file.fileno())


def timed(work: Callable[[], object]) -> float:
    """Return the seconds until the slowest rank is done; collective."""
    barrier()
    began = time.perf_counter()
    work()
    barrier()
    return time.perf_counter() - began


def remove(folder: Path) -> None:
    barrier()
    if is_main():
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        os.sync()
    barrier()


def report(seconds: dict[str, list[float]], rank_bytes: int) -> None:
    gib = rank_bytes / 2**30
    plain, blocking, total = (median(seconds[way]) for way in ("plain", "blocking", "background"))
    first, later = seconds["stall"][0], median(seconds["stall"][1:] or seconds["stall"])
    print(f"{gib:.2f} GiB per rank, median of {len(seconds['plain'])} rounds")
    print(f"plain writing      {plain:6.2f} s  {gib / plain:5.2f} GiB/s per rank")
    print(f"whole save         {blocking:6.2f} s  {gib / blocking:5.2f} GiB/s per rank, {plain / blocking:.2f} x plain")
    print(f"in the background  {total:6.2f} s  {gib / total:5.2f} GiB/s per rank, {plain / total:.2f} x plain")
    print(f"stall              {later:6.2f} s  {later / blocking:.2f} x a whole save (first time {first:.2f} s)")


if __name__ == "__main__":
    main()
