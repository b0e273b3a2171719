"""Check on one 80 GB CUDA GPU, in about ten minutes, that this code does there what it does on CPU; and how fast.

    python bench/gpu.py --out acceptance                     runs all parts; results, lines and logs are kept there
    python bench/gpu.py --out acceptance                     again: what has passed is kept, the rest is run
    python bench/gpu.py --out acceptance --parts layers speed
    python bench/gpu.py --out acceptance --wheels wheels     first installs wheels/*.whl into acceptance/packages
    python bench/gpu.py --out acceptance --device cpu --tiny tests the program without a GPU; ignore the figures

Every part is a process of its own and ends within five minutes; a longer one is stopped and counts as red. A line is
green or red, with its number. Nothing needs a network or a published model: models are random, photos are drawn.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cogvlm_ft.pinned_memory import allocate_pinned_exactly

PARTS = {
    "layers": "gpu_layers:compare_layers",
    "engine": "gpu_engine:check_engine",
    "offload": "gpu_engine:check_offload",
    "two_ranks": "gpu_engine:check_two_ranks",
    "write_17b": "gpu_17b:write_model",
    "use_17b": "gpu_17b:use_model",
    "speed": "gpu_speed:check_mfu",
    "signals": "gpu_signals:check_signals",
    "compile": "gpu_engine:check_compile",
    "memory": "gpu_engine:check_memory",
}
LIMIT_S = 290
PACKAGES = ("torch", "transformers", "deepspeed", "webdataset", "omegaconf")
OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Setup:
    """device: cuda or cpu. tiny: toy sizes. out: where a part may keep files."""

    device: str
    tiny: bool
    out: Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results; a second call continues there")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy models and images")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that this machine lacks")
    args = parser.parse_args(argv)
    for name in OF_LAUNCHERS:
        os.environ.pop(name, None)
    allocate_pinned_exactly(os.environ)
    args.out.mkdir(parents=True, exist_ok=True)
    packages = args.out.resolve() / "packages"
    if args.wheels:
        install(sorted(args.wheels.glob("*.whl")), packages)
    if packages.is_dir():
        sys.path.insert(0, str(packages))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not has_gpu():
        print("bench/gpu.py: no CUDA GPU found; nothing was measured")
        return 1
    setup = Setup(args.device, args.tiny, args.out.resolve())
    results = {name: run_or_keep(name, setup) for name in args.parts}
    red = [name for name, result in results.items() if not is_green(result)]
    print(
        f"\n{len(results) - len(red)} of {len(results)} parts are green" + (f"; red: {', '.join(red)}" if red else "")
    )
    return 1 if red else 0


def install(wheels: list[Path], folder: Path) -> None:
    """Install the wheels, and nothing that they depend on, into a folder of their own."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
    subprocess.run([*command, "--target", str(folder), *map(str, wheels)], check=True)


def has_gpu() -> bool:
    """Ask another process, so that this one may start its parts without a CUDA context."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def run_or_keep(name: str, setup: Setup) -> dict[str, Any]:
    """Return the result of a part: the one in the folder if it was green, else a new one."""
    file = setup.out / f"{name}.json"
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if is_green(kept) and kept["device"] == setup.device and kept["tiny"] == setup.tiny:
            show(name, kept, "kept")
            return kept
    print(f"{name} ...", flush=True)
    result = run_part(name, setup)
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)
    show(name, result, f"{result['seconds']:.0f} s")
    return result


def run_part(name: str, setup: Setup) -> dict[str, Any]:
    """Run a part in its own process group; stop it after `LIMIT_S`."""
    # A forked process may not use CUDA if this one has; on CPU forking saves the imports.
    context: Any = multiprocessing.get_context("spawn" if setup.device == "cuda" else "fork")
    receiving, sending = context.Pipe(duplex=False)
    start = time.perf_counter()
    process = context.Process(target=part_process, args=(name, setup, sending))
    process.start()
    sending.close()
    found: dict[str, Any] = {"lines": [], "machine": {}}
    with contextlib.suppress(EOFError):
        if receiving.poll(LIMIT_S):
            found = receiving.recv()
    if process.is_alive() and not found["lines"]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.join()
    if not found["lines"]:
        text = f"no result after {time.perf_counter() - start:.0f} s, exit code {process.exitcode}; see {name}.log"
        found["lines"] = [{"name": "the part ends", "is_green": False, "found": text}]
    return {**found, "seconds": time.perf_counter() - start, "device": setup.device, "tiny": setup.tiny}


def part_process(name: str, setup: Setup, sending: Any) -> None:
    """Run a part and send its lines; what it prints goes into its log."""
    os.setpgrp()
    with (setup.out / f"{name}.log").open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.path.insert(0, str(Path(__file__).parent))
        module, _, function = PARTS[name].partition(":")
        try:
            lines = [asdict(line) for line in getattr(importlib.import_module(module), function)(setup)]
        except BaseException as error:  # whatever it is, the other parts have their turn
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}"[:500]
            lines = [{"name": "the part ends", "is_green": False, "found": f"{text}; see {name}.log"}]
        sys.stdout.flush()
        sending.send({"lines": lines, "machine": machine()})


def machine() -> dict[str, str]:
    """Return the versions and the GPU with which a part has run."""
    facts = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    import torch

    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = str(torch.version.cuda)
    return facts


def is_green(result: dict[str, Any]) -> bool:
    return bool(result["lines"]) and all(line["is_green"] for line in result["lines"])


def show(name: str, result: dict[str, Any], when: str) -> None:
    print(f"{name} ({when}): {', '.join(f'{key} {value}' for key, value in result['machine'].items())}")
    for line in result["lines"]:
        print(f"  {'green' if line['is_green'] else 'RED  '} {line['name']}: {line['found']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
