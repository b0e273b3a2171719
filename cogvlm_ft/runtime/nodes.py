"""Work that one rank of each node does for all ranks there."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from cogvlm_ft.runtime.cores import node_id
from cogvlm_ft.runtime.distributed import (
    SHARED_ERRORS,
    WATCHED_TIMEOUT_S,
    from_main,
    gather_to_main,
    rank,
    shared_errors,
    world_size,
)

T = TypeVar("T")


def computed_once_per_node(compute: Callable[[], T], inputs: object = None) -> T:
    """Return on every rank what the first rank of its node computes. Collective, but `compute` is not.

    inputs: what the value depends on; ranks of a node with other inputs compute their own. The others wait as long as
    it takes. Every rank raises the first error, of the kinds of `shared_errors`.
    """
    if world_size() == 1:
        return compute()
    places = from_main(gather_to_main((node_id(), repr(inputs))))
    mine, group = [rank()], None
    for place in dict.fromkeys(places):
        ranks = [number for number, other in enumerate(places) if other == place]
        made = dist.new_group(ranks, backend="gloo", timeout=timedelta(seconds=WATCHED_TIMEOUT_S))  # on every rank
        if rank() in ranks:
            mine, group = ranks, made
    with shared_errors():
        value: T = _from_first(compute, mine, group)
    dist.destroy_process_group(group)
    return value


def _from_first(compute: Callable[[], T], ranks: list[int], group: dist.ProcessGroup | None) -> T:
    """Return what the first of the ranks computes, or raise its error."""
    box: list[Any] = [None, None]
    if rank() == ranks[0]:
        try:
            box[0] = compute()
        except SHARED_ERRORS as error:
            box[1] = error
    dist.broadcast_object_list(box, src=ranks[0], group=group)
    if box[1] is not None:
        raise box[1]
    result: T = box[0]
    return result
