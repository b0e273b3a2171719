"""Writes many shards at once."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import wait

from shards.layout import Slice
from shards.pack import PackSettings, write_shard


def write_shards(slices: list[Slice], settings: PackSettings, num_workers: int) -> Iterator[int]:
    """Write every shard; yields the number of candidates of each as it is finished, in any order."""
    num_workers = min(num_workers, len(slices))
    if num_workers <= 1:
        for part in slices:
            yield write_shard(part, settings)
        return
    # forkserver: no inherited threads or locks, and webdataset is imported once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["webdataset", "shards.pack"])
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_die_with_parent) as pool:
        try:
            for done in as_completed([pool.submit(write_shard, part, settings) for part in slices]):
                yield done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _die_with_parent() -> None:
    """End this worker when the main process ends.

    After a kill -9 of that, it would wait for work for ever, or write into the next build.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
