"""Explain running out of memory: the estimate of launch/plan.py, and a setting that would have fitted."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import psutil
import torch

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.model import CogVLMConfig, model_config_of
from cogvlm_ft.planning.activations import MicroBatchShape
from cogvlm_ft.planning.data_turns import largest_pass
from cogvlm_ft.planning.memory import GIB, Cluster, Planner, judge
from cogvlm_ft.planning.preflight import cgroup_limit, this_cluster
from cogvlm_ft.planning.suggestions import cheaper_settings, find_limits, suggest_changes
from cogvlm_ft.runtime.distributed import device, rank
from cogvlm_ft.settings import Config

# Messages of torch's allocators on CPU, of CUDA's calls (pinned memory: "CUDA error: out of memory"), cuBLAS, cuDNN and
# NCCL ("Cuda failure 2 'out of memory'", "Failed to CUDA calloc async 608 bytes"), all of them a RuntimeError.
ALLOCATOR_WORDS = (
    *("can't allocate memory", "not enough memory", "Cannot allocate memory", "std::bad_alloc"),
    *("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
    *("Failed to CUDA calloc", "Failed to CUDA host alloc", "Failed to CUDA malloc"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Recognise the errors of Python, CUDA, NCCL, and torch's allocators of the host, pinned memory included."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATOR_WORDS)


@contextmanager
def memory_errors_explained(config: Config) -> Iterator[None]:
    """Turn running out of memory inside into a ConfigError that names settings that fit. Collective."""
    cluster = this_cluster()
    cluster = replace(cluster, gpu_gib=min(cluster.gpu_gib, memory_limit() / GIB))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # The traceback's frames keep the tensors alive; the explanation needs memory too.
        found = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}"
        error.__traceback__ = None
        model_config = model_config_of(config)
        message = explain_out_of_memory(found, config, model_config, cluster, largest_pass(config, model_config))
    else:
        return
    raise ConfigError(message)


def explain_out_of_memory(
    found: str, config: Config, model_config: CogVLMConfig, cluster: Cluster, sequences: MicroBatchShape
) -> str:
    """Return the message. found: text of the error; cluster: with the memory that this rank can really use.

    sequences: with the turns of the image that has most, since all rows of a pass are padded to the longest.
    """
    planner = Planner(config, model_config, cluster)
    estimate = planner.estimate(sequences)
    verdict = judge(estimate, cluster)
    text = f"rank {rank()} ran out of memory ({found}). Estimate of launch/plan.py: {verdict.why}"
    if verdict.status != "fits":
        changes = suggest_changes(planner, sequences)
        fitting = find_limits(planner, sequences).micro_batch_size
        per_rank = config.train.global_batch_size // cluster.num_gpus  # which a micro-batch must divide
        largest = max((size for size in range(1, fitting + 1) if per_rank % size == 0), default=1)
        if 1 < largest < config.train.micro_batch_size:
            changes.insert(0, f"train.micro_batch_size={largest}")
        if changes:
            return f"{text}. What would fit: {'; or '.join(changes)}"
    else:
        text += (
            f". So it should fit with {sequences.turns} short turns per image: longer ones, other programs or a "
            "fragmented allocator need the rest"
        )
    peak = max(estimate.peaks.values())
    cheaper = cheaper_settings(planner, sequences)
    savings = [f"{name} ({peak / GIB:.2f} -> {less / GIB:.2f} GiB)" for name, less in cheaper]
    return f"{text}. Settings that need less: {'; or '.join([*savings, 'more GPUs'])}"


def memory_limit() -> int:
    """Return the bytes available to this rank, on its GPU or, on CPU, on the host, after limits and other programs.

    Much of an address space (ulimit -v) is reserved and never used; what is reserved now is subtracted.
    """
    if device().type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved()
    limits = [cgroup_limit() or psutil.virtual_memory().total]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        memory = psutil.Process().memory_info()
        limits.append(address_space - (memory.vms - memory.rss))
    return max(0, min(limits))
