"""This rank's identity, and the few collectives that the program needs.

Works under deepspeed, torchrun, srun and plain python.
"""

from __future__ import annotations

import atexit
import os
import socket
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it on import, and warns without it
import deepspeed

from cogvlm_ft.runtime.gloo_threads import wait_until_at_rest

# Launchers set the same three numbers under different names; the first that is set is used.
RANK_VARIABLES = {
    "RANK": ("RANK", "SLURM_PROCID"),
    "WORLD_SIZE": ("WORLD_SIZE", "SLURM_NTASKS"),
    "LOCAL_RANK": ("LOCAL_RANK", "SLURM_LOCALID"),
}
DEFAULT_TIMEOUT_S = 1800
AFTER_WATCHDOG_S = 300  # how much longer than the watchdog a collective waits: the watchdog's stacks tell more


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _fill_environment() -> None:
    """Set the five variables that DeepSpeed expects; without them it would look for MPI."""
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    in_srun = "SLURM_PROCID" in os.environ and "MASTER_ADDR" in os.environ
    for name, sources in RANK_VARIABLES.items():
        usable = [source for source in sources if source in os.environ and (in_srun or not source.startswith("SLURM"))]
        os.environ[name] = os.environ[usable[0]] if usable else defaults[name]
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))


def init_distributed(hang_timeout_s: float | None = None) -> None:
    """Join the process group and set this rank's device. Collective.

    hang_timeout_s: that of the watchdog, None without a watchdog.
    """
    _fill_environment()
    if device().type == "cuda":
        torch.cuda.set_device(device())
    else:
        _share_cores()
        # Only inference uses this shared-memory op; compiling it takes 50 s and needs a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls functions that torch has renamed: a warning in every backward pass.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*`torch\.distributed\.")
    timeout_s = max(DEFAULT_TIMEOUT_S, (hang_timeout_s or 0) + AFTER_WATCHDOG_S)
    deepspeed.init_distributed(timeout=timedelta(seconds=timeout_s), verbose=False)
    atexit.register(wait_until_at_rest)


def shut_down() -> None:
    """Leave the process group on all ranks at the same time, so that none loses a peer it still needs. Collective."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _share_cores() -> None:
    """Divide the cores of a node among its ranks on CPU, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" not in os.environ:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))


def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Return element-wise sums over the ranks, in float64, in one message. Collective."""
    packed = torch.tensor(values, dtype=torch.float64, device=device())
    if world_size() > 1:
        dist.all_reduce(packed)
    return packed.tolist()


def any_ranks(flags: Sequence[bool]) -> list[bool]:
    """Return for each flag whether it is true on any rank. Collective."""
    return [count > 0 for count in all_reduce_sum([float(flag) for flag in flags])]


def any_rank(flag: bool) -> bool:
    """Return whether the flag is true on any rank. Collective."""
    return any_ranks([flag])[0]


def every_rank(flag: bool) -> bool:
    """Return whether the flag is true on every rank. Collective."""
    return not any_rank(not flag)


def gather_to_main(value: Any, group: dist.ProcessGroup | None = None) -> list[Any] | None:
    """Return the ranks' values in rank order on rank 0, None elsewhere. Collective.

    group: a process group of all ranks other than the default one.
    """
    if world_size() == 1:
        return [value]
    gathered: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, gathered, group=group)
    return gathered


def from_main(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Return rank 0's value on every rank. Collective.

    group: a process group of all ranks other than the default one.
    """
    if world_size() == 1:
        return value
    box = [value]
    on_gpu = device().type == "cuda" and dist.get_backend(group) == "nccl"
    dist.broadcast_object_list(box, group=group, device=device() if on_gpu else None)
    return box[0]
