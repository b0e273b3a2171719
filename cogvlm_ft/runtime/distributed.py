"""This rank's identity, and the few collectives that the program needs.

Works under deepspeed, torchrun, srun and plain python.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it on import, and warns without it
import deepspeed

from cogvlm_ft.errors import CheckpointError, ConfigError, DataError, ServerError
from cogvlm_ft.runtime.cores import THREADS_VARIABLE, is_set_by_launcher, node_id, threads_of
from cogvlm_ft.runtime.gloo_threads import wait_until_at_rest
from cogvlm_ft.runtime.outcome import OUTCOME_VARIABLE
from cogvlm_ft.runtime.ports import check_address, free_port

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Launchers set the same three numbers under different names.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
LAUNCHERS = {
    "torchrun, deepspeed": TORCHRUN,
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MVAPICH": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "jsrun": ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK"),
    "flux": ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID"),
    "Intel MPI, MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}
LOCAL_RANKS = ("LOCAL_RANK", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID")  # where a launcher does not set its own
RANKS_ALONE = ("RANK", "PMIX_RANK", "PALS_RANKID")  # of launchers that may state no number of ranks
DEFAULT_TIMEOUT_S = 1800
SHARED_ERRORS = (OSError, ConfigError, DataError, CheckpointError, ServerError)
WATCHED_TIMEOUT_S = 7 * 86400  # of collectives under the watchdog, which knows whether the others make progress

_timeout_s = DEFAULT_TIMEOUT_S


def _fill_environment() -> None:
    """Set the five variables that DeepSpeed expects; without them it would look for MPI.

    Raises ConfigError if a launcher started several ranks, but their address is unknown: each would train alone.
    """
    found = ranks_of_launcher(os.environ)
    os.environ.update(zip(TORCHRUN, map(str, found._replace(local_rank=found.local_rank or 0)), strict=True))
    if found.world_size == 1:
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # where torchrun listens, rank 0 does not
            os.environ.pop("MASTER_ADDR", None)  # what a job script exported may name another node
        os.environ["MASTER_ADDR"] = os.environ.get("MASTER_ADDR") or "127.0.0.1"
        os.environ["MASTER_PORT"] = os.environ.get("MASTER_PORT") or str(free_port())
    check_address(os.environ)
    if torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = str(device_index(found.local_rank, torch.cuda.device_count()))


class LauncherRanks(NamedTuple):
    """local_rank: None where the launcher does not state it."""

    rank: int
    world_size: int
    local_rank: int | None


def ranks_of_launcher(environment: Mapping[str, str]) -> LauncherRanks:
    """Read rank, number of ranks and rank on the node from the variables of the launcher, if there is one.

    Of launchers within each other, such as mpirun in the shell that Slurm started for salloc, the one with the most
    ranks counts; RANK and WORLD_SIZE count before all. Raises ConfigError if there are several ranks without
    MASTER_ADDR and MASTER_PORT.
    """
    found = {
        launcher: int(environment[names[1]])
        for launcher, names in LAUNCHERS.items()
        if all(environment.get(name, "").isdigit() for name in names[:2])
    }
    if not found:
        _check_alone(environment)
        return LauncherRanks(0, 1, 0)
    launcher = next(iter(LAUNCHERS)) if next(iter(LAUNCHERS)) in found else max(found, key=lambda name: found[name])
    names, size = LAUNCHERS[launcher], found[launcher]
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if size > 1 and missing:
        raise ConfigError(
            f"{launcher} started {size} ranks ({names[1]}={size}): found no {' and no '.join(missing)}; expected "
            "the address of rank 0 and a free port, the same on all ranks. Export them, or use slurm/train.sbatch, "
            "torchrun or deepspeed"
        )
    if int(environment[names[0]]) >= size:
        raise ConfigError(
            f"{names[0]}={environment[names[0]]}: found {names[1]}={size}; expected numbers from 0 to {names[1]} - 1, "
            "each on one rank. Correct what exports them"
        )
    local = next((environment[name] for name in (names[2], *LOCAL_RANKS) if environment.get(name, "").isdigit()), None)
    return LauncherRanks(int(environment[names[0]]), size, int(local) if local else 0 if size == 1 else None)


def _check_alone(environment: Mapping[str, str]) -> None:
    """Raise ConfigError if this is one of several ranks, whose number is not known."""
    known = next((name for name in RANKS_ALONE if environment.get(name, "").isdigit()), None)
    if known is None and environment.get("WORLD_SIZE", "") in ("", "1"):
        return
    known, missing = (known, "number of ranks") if known else ("WORLD_SIZE", "RANK")
    raise ConfigError(
        f"{known}={environment[known]}: found no {missing}; expected RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
        "MASTER_PORT on every rank. Export them, or use slurm/train.sbatch, torchrun or deepspeed"
    )


def device_index(local_rank: int | None, num_devices: int) -> int:
    """Return the number of this rank's GPU among those it sees: all of the node, or only its own.

    Raises ConfigError if it sees several, but not one for each rank, or if its rank on the node is not known.
    """
    if num_devices == 1:
        return 0  # CUDA_VISIBLE_DEVICES or --gpus-per-task hides the GPUs of other ranks
    if local_rank is None:
        raise ConfigError(
            f"LOCAL_RANK: found none, and {num_devices} GPUs; expected this rank's number on its node, from 0. Export "
            "LOCAL_RANK on every rank, or use torchrun, deepspeed or srun"
        )
    if local_rank >= num_devices:
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES: rank {local_rank} of its node sees {num_devices} GPUs; expected one GPU per rank, "
            "or only the GPU of this rank. Start as many ranks per node as there are GPUs"
        )
    return local_rank


def init_distributed() -> None:
    """Join the process group and set this rank's device. Collective. Raises ConfigError if rank 0's port is in use."""
    _fill_environment()
    check_gpus()
    use_device()
    if device().type != "cuda":
        # Only inference uses this shared-memory op; compiling it takes 50 s and needs a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls functions that torch has renamed: a warning in every backward pass.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*`torch\.distributed\.")
    try:
        deepspeed.init_distributed(timeout=timedelta(seconds=DEFAULT_TIMEOUT_S), verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error) or OUTCOME_VARIABLE in os.environ:
            raise  # slurm/train.sbatch starts it again, with another port
        raise ConfigError(
            f"MASTER_PORT={os.environ['MASTER_PORT']}: found in use on this node, perhaps by another run; expected a "
            f"free port. Give deepspeed --master_port {free_port()}, torchrun --master-port, or set MASTER_PORT"
        ) from error
    if device().type == "cpu":
        share_cores()
    atexit.register(wait_until_at_rest)


def leave_hangs_to_watchdog() -> None:
    """Let collectives wait as long as they must: the watchdog decides from now on what is a hang."""
    global _timeout_s
    _timeout_s = WATCHED_TIMEOUT_S
    apply_timeout()


def apply_timeout() -> None:
    """Give all process groups one timeout; DeepSpeed creates some, as for hpZ, with NCCL's default of 10 minutes."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=_timeout_s), group)


def use_device() -> None:
    """Set the device of this thread: in CUDA every new thread begins with GPU 0."""
    if device().type == "cuda":
        torch.cuda.set_device(device())


def release_unused_memory() -> None:
    """Return what the GPU's allocator holds and does not use: other shapes follow."""
    if device().type == "cuda":
        torch.cuda.empty_cache()


def check_gpus(devices: Path = Path("/dev")) -> None:
    """Raise ConfigError if the machine has NVIDIA GPUs and torch or DeepSpeed does not use them.

    An empty CUDA_VISIBLE_DEVICES says that the CPU is meant.
    """
    if torch.cuda.is_available():
        if os.environ.get("DS_ACCELERATOR") == "cpu":
            raise ConfigError(
                "DS_ACCELERATOR=cpu: found a GPU, on which DeepSpeed would not train; expected the variable unset. "
                "Run unset DS_ACCELERATOR, or train on the CPU with CUDA_VISIBLE_DEVICES="
            )
        return
    found = sorted(devices.glob("nvidia[0-9]*"))
    if not found:
        return
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1", "NoDevFiles"):
        return
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU only"
    raise ConfigError(
        f"CUDA: found {found[0]}, but torch {torch.__version__} ({build}) sees no GPU; expected one. Try "
        "nvidia-smi, and install the torch of its CUDA version; CUDA_VISIBLE_DEVICES= uses the CPU"
    )


def shut_down() -> None:
    """Leave the process group on all ranks at the same time, so that none loses a peer it still needs. Collective."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def share_cores(needed_for: str = "") -> None:
    """Divide the cores of a node among the ranks that may use them, unless OMP_NUM_THREADS was set. Collective.

    torchrun sets it to 1 where it is unset; deepspeed leaves all cores to every rank. needed_for: what the log says.
    """
    mine, node = sorted(os.sched_getaffinity(0)), node_id()
    num_threads = threads_of(node, mine, from_main(gather_to_main((node, mine))))
    given = os.environ.get(THREADS_VARIABLE)
    if given is not None and not is_set_by_launcher():
        if needed_for:
            logger.info("%s: %s threads per rank, as %s is set", needed_for, given, THREADS_VARIABLE)
        return
    os.environ[THREADS_VARIABLE] = str(num_threads)  # for an OpenMP library that a compiled optimizer loads later
    torch.set_num_threads(num_threads)
    if needed_for:
        logger.info(
            "%s: %d threads per rank, its part of %d cores%s; set %s to change it",
            needed_for,
            num_threads,
            len(mine),
            "" if given is None else f", instead of {given} as set by torchrun",
            THREADS_VARIABLE,
        )


def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def first_devices(num_devices: int) -> list[torch.device]:
    """Return this rank's device, or the first of several GPUs. Raises ConfigError where there are fewer."""
    if num_devices == 1:
        return [device()]
    found = torch.cuda.device_count()
    if not 1 <= num_devices <= found:
        raise ConfigError(
            f"--devices {num_devices}: found {found} GPUs; expected 1 to {max(1, found)}. Omit --devices, or use "
            "--weights int8, which takes half the memory"
        )
    return [torch.device("cuda", number) for number in range(num_devices)]


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


@contextlib.contextmanager
def shared_errors() -> Iterator[None]:
    """Raise on every rank the first error that any rank raises in the block. Collective, but nothing in the block is.

    Applies to files that cannot be read or written, perhaps on one node alone, and to a user's mistake found there:
    with the error on one rank alone, the others would wait for it in the next collective.
    """
    problem: Exception | None = None
    try:
        yield
    except SHARED_ERRORS as error:
        problem = error
    if any_rank(problem is not None):
        found = gather_to_main(problem)
        raise from_main(next(each for each in found if each is not None) if found is not None else None)


@contextlib.contextmanager
def shared_errors_of_main() -> Iterator[None]:
    """Raise on every rank what rank 0 raises in the block, which only rank 0 executes. Collective.

    The kinds of errors are those of `shared_errors`.
    """
    problem: Exception | None = None
    try:
        yield
    except SHARED_ERRORS as error:
        if not is_main():
            raise
        problem = error
    problem = from_main(problem)
    if problem is not None:
        raise problem


def computed_by_main(compute: Callable[[], T]) -> T:
    """Return on every rank what rank 0 computes, or raise its error. Collective."""
    value: Any = None
    with shared_errors_of_main():
        if is_main():
            value = compute()
    result: T = from_main(value)
    return result
