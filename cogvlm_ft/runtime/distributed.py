"""Ranks: who am I, and the few collectives that the program needs.

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
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it when imported, and warns without it
import deepspeed

from cogvlm_ft.runtime.gloo_threads import wait_until_at_rest

# Launchers name the same three numbers differently; the first that is set wins.
RANK_VARIABLES = {
    "RANK": ("RANK", "SLURM_PROCID"),
    "WORLD_SIZE": ("WORLD_SIZE", "SLURM_NTASKS"),
    "LOCAL_RANK": ("LOCAL_RANK", "SLURM_LOCALID"),
}
DEFAULT_TIMEOUT_S = 1800
AFTER_WATCHDOG_S = 300  # how much longer than the watchdog a collective waits: the watchdog's stacks say more


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _fill_environment() -> None:
    """Set the five variables that DeepSpeed wants; without them it would look for MPI."""
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    in_srun = "SLURM_PROCID" in os.environ and "MASTER_ADDR" in os.environ
    for name, sources in RANK_VARIABLES.items():
        usable = [source for source in sources if source in os.environ and (in_srun or not source.startswith("SLURM"))]
        os.environ[name] = os.environ[usable[0]] if usable else defaults[name]
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))


def init_distributed(hang_timeout_s: float | None = None) -> None:
    """Collective. Join the process group and take this rank's device. hang_timeout_s: of the watchdog, None without."""
    _fill_environment()
    if device().type == "cuda":
        torch.cuda.set_device(device())
    else:
        _share_cores()
        # DeepSpeed would compile a shared-memory op that only inference uses: 50 s and a compiler at every first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls what torch has renamed, and would be warned about it in every backward pass.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*`torch\.distributed\.")
    timeout_s = max(DEFAULT_TIMEOUT_S, (hang_timeout_s or 0) + AFTER_WATCHDOG_S)
    deepspeed.init_distributed(timeout=timedelta(seconds=timeout_s), verbose=False)
    atexit.register(wait_until_at_rest)


def shut_down() -> None:
    """Collective. Leave the process group, all ranks at the same time: none loses a peer that it still needs."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _share_cores() -> None:
    """On CPU the ranks of a node share its cores, unless OMP_NUM_THREADS says otherwise."""
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
    """Collective. Element-wise sums over the ranks, in float64; one message however many values."""
    packed = torch.tensor(values, dtype=torch.float64, device=device())
    if world_size() > 1:
        dist.all_reduce(packed)
    return packed.tolist()


def any_ranks(flags: Sequence[bool]) -> list[bool]:
    """Collective. For each flag: true if it is true somewhere."""
    return [count > 0 for count in all_reduce_sum([float(flag) for flag in flags])]


def any_rank(flag: bool) -> bool:
    """Collective. True if it is true somewhere."""
    return any_ranks([flag])[0]


def every_rank(flag: bool) -> bool:
    """Collective. True if it is true everywhere."""
    return not any_rank(not flag)


def gather_to_main(value: Any, group: dist.ProcessGroup | None = None) -> list[Any] | None:
    """Collective. The ranks' values in rank order on rank 0, None elsewhere. group: another one of all ranks."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, gathered, group=group)
    return gathered


def from_main(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Collective. Rank 0's value, everywhere. group: another one of all ranks."""
    if world_size() == 1:
        return value
    box = [value]
    on_gpu = device().type == "cuda" and dist.get_backend(group) == "nccl"
    dist.broadcast_object_list(box, group=group, device=device() if on_gpu else None)
    return box[0]
