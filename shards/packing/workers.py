"""Writes many shards at once."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from multiprocessing.connection import wait

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.packing.splits import Slice
from cogvlm_ft.shards.packing.tar_writing import PackSettings, write_shard


def warm_up(num_workers: int) -> None:
    """Start the process that workers are forked from: it imports what they need while the annotations are read.

    Of its own, so that workers inherit no threads and no locks.
    """
    if num_workers > 1:
        multiprocessing.set_forkserver_preload(["cogvlm_ft.shards.packing.tar_writing"])
        forkserver.ensure_running()


def write_shards(slices: list[Slice], settings: PackSettings, num_workers: int) -> Iterator[int]:
    """Write every shard; yields the number of candidates of each as it is finished, in any order."""
    num_workers = min(num_workers, len(slices))
    if num_workers <= 1:
        for part in slices:
            yield write_shard(part, settings)
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=die_with_parent) as pool:
        try:
            for done in as_completed([pool.submit(write_shard, part, settings) for part in slices]):
                yield done.result()
        except BrokenProcessPool:
            raise DataError("a worker was killed, perhaps for memory: run it again with fewer --workers") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def die_with_parent() -> None:
    """End this worker when the main process ends.

    After a kill -9 of that, it would wait for work for ever, or write into the next build.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
