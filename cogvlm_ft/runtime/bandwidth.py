"""Measure the bandwidth between ranks; a side channel in case the measured backend is broken."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cogvlm_ft.runtime.distributed import device, from_main, gather_to_main, rank, world_size

TIMEOUT_S = 120  # of a measured message; the default of a training run is half an hour
SIDE_TIMEOUT_S = 86400  # of the side channel: ranks wait for one that reads terabytes; a dead rank is noticed at once
MESSAGE_BYTES = {"cuda": 256 * 2**20, "cpu": 32 * 2**20}  # a layer of the 17B model has 400 MiB in bf16
NUM_REPEATS = 3


class SideChannel:
    """Exchange small objects between the ranks over the hosts' network (gloo), independent of NCCL.

    Its constructor is collective.
    """

    def __init__(self) -> None:
        several = world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=SIDE_TIMEOUT_S)) if several else None

    def to_main(self, value: Any) -> list[Any] | None:
        """Return the ranks' values in rank order on rank 0, None elsewhere. Collective."""
        return gather_to_main(value, self._group)

    def from_main(self, value: Any) -> Any:
        """Return rank 0's value on every rank. Collective."""
        return from_main(value, self._group)


@dataclass(frozen=True)
class Rates:
    """Bandwidths measured by one rank, in bytes per second that it sends.

    to_next: to the next rank, all ranks at the same time.
    """

    backend: str
    message_bytes: int
    all_gather: float
    all_reduce: float
    to_next: float


def measure_rates() -> Rates:
    """Measure messages of the size of a layer in the ways that ZeRO-3 sends them. Collective; needs 2 ranks or more."""
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    ranks, kind = world_size(), device().type
    num_elements = MESSAGE_BYTES[kind] // 4 // ranks * ranks
    whole = torch.ones(num_elements, device=device())
    part = torch.ones(num_elements // ranks, device=device())
    received = torch.empty_like(whole)
    num_bytes = 4 * num_elements
    others = (ranks - 1) / ranks
    return Rates(
        backend=str(dist.get_backend(group)),
        message_bytes=num_bytes,
        all_gather=num_bytes * others / _seconds(lambda: dist.all_gather_into_tensor(received, part, group=group)),
        all_reduce=2 * num_bytes * others / _seconds(lambda: dist.all_reduce(whole, group=group)),
        to_next=num_bytes / _seconds(lambda: _pass_on(whole, received, group)),
    )


def _pass_on(sent: Tensor, received: Tensor, group: Any) -> None:
    after, before = (rank() + 1) % world_size(), (rank() - 1) % world_size()
    steps = [dist.P2POp(dist.isend, sent, after, group), dist.P2POp(dist.irecv, received, before, group)]
    for work in dist.batch_isend_irecv(steps):
        work.wait()


def _seconds(message: Callable[[], Any]) -> float:
    """Return the median duration of NUM_REPEATS messages, after one that sets up the connections."""
    taken = []
    for _ in range(1 + NUM_REPEATS):
        start = time.perf_counter()
        message()
        if device().type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])
