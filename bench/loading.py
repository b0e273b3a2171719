"""Compare loading a model folder under ZeRO-3 with transformers' `from_pretrained`.

    python bench/loading.py [--mib 2048] [--ranks 2] [--rounds 1]

Writes a random fp32 model folder of several safetensors files and reads it from disk on real ranks, each time in new
processes. Memory is anonymous memory (RssAnon of /proc/self/status) above its value after the imports, sampled every
2 ms; pages of mapped files, which the system can reclaim, are listed separately. Bytes read are those of the requested
slices. `from_pretrained` needs accelerate: pip install -c constraints.txt -e ".[bench]"
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import initialization

from cogvlm_ft.config import load_config as load_settings
from cogvlm_ft.model import CogVLMConfig, CogVLMForCausalLM, load_config
from cogvlm_ft.model.loading import Fetch, load_weights, parameter_shapes, save_weights
from cogvlm_ft.runtime.distributed import all_reduce_sum, barrier, init_distributed, rank, shut_down
from cogvlm_ft.runtime.engine import deepspeed_settings, partition_assign, partitioned

REPOSITORY = Path(__file__).resolve().parents[1]
NUM_FILES = 6
WAYS = {"ours": "slices into partitions", "transformers": "from_pretrained"}
TIMEOUT_S = 400
SAMPLE_EVERY_S = 0.002


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=2048, help="size of the model folder")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--folder", type=Path, help="where the model folder is written (default: a temporary folder)")
    parser.add_argument("--load", choices=WAYS, help="run as one rank; set by the program itself")
    args = parser.parse_args()
    if args.load:
        return load(args.load, args.folder, args.ranks)
    ways = [way for way in args.ways if way == "ours" or importlib.util.find_spec("accelerate")]
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        checkpoint_bytes = make_folder(folder, args.mib << 20)
        for _ in range(args.rounds):
            report({way: run_ranks(way, folder, args.ranks) for way in ways}, checkpoint_bytes)
    if ways != args.ways:
        print('from_pretrained was not measured: accelerate is missing. pip install -c constraints.txt -e ".[bench]"')
    return None


@dataclass(frozen=True)
class RandomTensor:
    """A tensor that is generated when it is read."""

    shape: torch.Size

    def read(self, start: int, stop: int) -> Tensor:
        return torch.randn(stop - start) * 0.02


def make_folder(folder: Path, num_bytes: int) -> int:
    """Write config.json and files of random weights, with as many layers as fit; return the bytes of the weights."""
    size = 1024 if num_bytes >= 1 << 30 else 256
    sizes = [count_bytes(model_config(size, num_layers)) for num_layers in (1, 2)]
    config = model_config(size, max(1, 1 + round((num_bytes - sizes[0]) / (sizes[1] - sizes[0]))))
    with torch.device("meta"):
        model = CogVLMForCausalLM(config)
    config.save_pretrained(folder)

    tensors = ((name, RandomTensor(parameter.shape)) for name, parameter in model.named_parameters())
    save_weights(folder, tensors, torch.float32, max_file_bytes=count_bytes(config) // NUM_FILES)
    os.sync()
    files = sorted(folder.glob("*.safetensors"))
    print(f"{count_bytes(config) / 2**20:.0f} MiB of fp32 weights in {len(files)} files", flush=True)
    return count_bytes(config)


def model_config(size: int, num_layers: int) -> CogVLMConfig:
    vision = {"hidden_size": size // 2, "num_heads": 4, "intermediate_size": 2 * size, "num_hidden_layers": 12}
    return CogVLMConfig(
        vocab_size=32 * size,
        hidden_size=size,
        intermediate_size=43 * size // 16,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        vision_config=vision,
    )


def count_bytes(config: CogVLMConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.nbytes for parameter in CogVLMForCausalLM(config).parameters())


def run_ranks(way: str, folder: Path, num_ranks: int) -> list[dict[str, Any]]:
    """Load the folder on new ranks; return the measurement of each, in rank order."""
    for path in folder.glob("*.safetensors"):
        forget(path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, __file__, "--load", way, "--folder", str(folder), "--ranks", str(num_ranks)]
    processes = [
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **shared, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(num_ranks)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        sys.exit(f"{way}: a rank failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def forget(path: Path) -> None:
    """Remove this file from the page cache."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def load(way: str, folder: Path, num_ranks: int) -> None:
    """Load the folder on this rank and print the measurement as the last line, in JSON; collective."""
    init_distributed()
    overrides = [f"model.path={folder}", "data.shards=none", "output_dir=none", f"train.global_batch_size={num_ranks}"]
    settings = deepspeed_settings(load_settings(None, overrides))
    if way == "transformers":  # imports come before the baseline
        import accelerate  # noqa: F401
        import transformers.integrations.deepspeed  # noqa: F401
    barrier()
    with Memory() as memory:
        start = time.perf_counter()
        if way == "ours":
            model, bytes_read = load_ours(folder, settings)
        else:
            model, bytes_read = load_with_transformers(folder, settings), None
        barrier()
        seconds = time.perf_counter() - start
    parts: list[Any] = [parameter for parameter in model.parameters()]
    checksum = all_reduce_sum([sum(float(part.ds_tensor.double().square().sum()) for part in parts)])[0]
    measured = {
        "seconds": seconds,
        "anonymous_bytes": memory.peak["RssAnon"],
        "file_bytes": memory.peak["RssFile"],
        "partition_bytes": sum(part.ds_tensor.nbytes for part in parts),
        "largest_bytes": max(part.ds_numel * part.ds_tensor.element_size() for part in parts),
        "bytes_read": bytes_read,
        "checksum": checksum,
    }
    print(f"\n{json.dumps({'rank': rank(), **measured})}", flush=True)
    shut_down()


def load_ours(folder: Path, settings: dict[str, Any]) -> tuple[Any, int]:
    """Load as build.py does; return the model and the bytes of the slices read."""
    bytes_read = 0
    with initialization.no_init_weights(), partitioned(settings):
        model = CogVLMForCausalLM(load_config(folder))
    parameters = list(model.named_parameters())
    assign = partition_assign(parameters)

    def counting(name: str, fetch: Fetch, num_rows: int) -> None:
        def counted(first: int, stop: int) -> Tensor:
            nonlocal bytes_read
            rows = fetch(first, stop)
            bytes_read += rows.nbytes
            return rows

        assign(name, counted, num_rows)

    load_weights(folder, parameter_shapes(parameters), counting)
    return model, bytes_read


def load_with_transformers(folder: Path, settings: dict[str, Any]) -> Any:
    """Load with `from_pretrained` under ZeRO-3, as its documentation describes."""
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig(settings)
    model = CogVLMForCausalLM.from_pretrained(folder)
    assert alive.is_zero3()
    return model


class Memory:
    """Peak RssAnon and RssFile of this process in bytes, above their values at the start."""

    def __init__(self) -> None:
        self.peak = {"RssAnon": 0, "RssFile": 0}
        self._before = resident_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            now = resident_bytes()
            self.peak = {key: max(self.peak[key], now[key] - self._before[key]) for key in self.peak}
            if self._ended.wait(SAMPLE_EVERY_S):
                return


def resident_bytes() -> dict[str, int]:
    fields = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(value.split()[0]) << 10 for key, value in fields if key in ("RssAnon", "RssFile")}


def report(measured: dict[str, list[dict[str, Any]]], checkpoint_bytes: int) -> None:
    """Print a line for each rank of each way, then the ratios."""
    for way, ranks in measured.items():
        for number, one in enumerate(ranks):
            print(
                f"{WAYS[way]:<22} rank {number}: {one['seconds']:5.1f} s, "
                f"{mib(one['anonymous_bytes'])} MiB anonymous, {mib(one['file_bytes'])} MiB of mapped files"
            )
    if "ours" not in measured:
        return
    ours = measured["ours"]
    fraction = max(one["anonymous_bytes"] / (1.25 * one["partition_bytes"] + one["largest_bytes"]) for one in ours)
    peak = max(one["anonymous_bytes"] for one in ours)
    print(f"partition {mib(ours[0]['partition_bytes'])} MiB, largest tensor {mib(ours[0]['largest_bytes'])} MiB")
    print(
        f"our peak: {peak / ours[0]['partition_bytes']:.2f} partitions; {fraction:.2f} x (1.25 partitions + largest "
        "tensor), target 1.00"
    )
    read = sum(one["bytes_read"] for one in ours)
    print(f"bytes read over all ranks: {read / checkpoint_bytes:.4f} checkpoints (target 1)")
    if "transformers" in measured:
        theirs = measured["transformers"]
        slower = max(one["seconds"] for one in theirs) / max(one["seconds"] for one in ours)
        larger = max(one["anonymous_bytes"] for one in theirs) / peak
        same = abs(ours[0]["checksum"] - theirs[0]["checksum"]) < 1e-9 * ours[0]["checksum"]
        print(f"from_pretrained takes {slower:.2f} x our time and {larger:.2f} x our memory")
        print(f"both loaded the same weights: {'yes' if same else 'NO'}")


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:6.0f}"


if __name__ == "__main__":
    main()
