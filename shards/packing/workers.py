"""Write shards in several processes."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from multiprocessing.connection import wait

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.packing.splits import ShardPlan
from cogvlm_ft.shards.packing.tar_writing import WriteSettings, write_shard


def warm_up(num_workers: int) -> None:
    """Start the process that workers are forked from; it imports their modules while the annotations are read.

    A separate process, so that workers inherit no threads and no locks.
    """
    if num_workers > 1:
        multiprocessing.set_forkserver_preload(["cogvlm_ft.shards.packing.tar_writing"])
        forkserver.ensure_running()


def write_shards(plans: list[ShardPlan], settings: WriteSettings, num_workers: int) -> Iterator[int]:
    """Write every shard and yield its number of candidates when it is finished, in any order."""
    num_workers = min(num_workers, len(plans))
    if num_workers <= 1:
        for plan in plans:
            yield write_shard(plan, settings)
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker) as pool:
        try:
            for done in as_completed([pool.submit(write_shard, plan, settings) for plan in plans]):
                yield done.result()
        except BrokenProcessPool:
            raise DataError(
                "a worker was killed, perhaps for lack of memory. Run again with fewer --workers."
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker() -> None:
    die_with_parent()
    import_webdataset_without_torch()


def import_webdataset_without_torch() -> None:
    """Import webdataset in a process that only writes shards, in a tenth of a second instead of three.

    webdataset imports torch if there is one. Not for other processes: its data sets would be none of torch's.
    """
    if "torch" in sys.modules:
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it fails, as if it were not installed
    try:
        importlib.import_module("webdataset.writer")
    finally:
        del sys.modules["torch"]


def die_with_parent() -> None:
    """End this worker when the main process ends.

    After a kill -9 of the main process it would wait for work indefinitely, or write into the next build.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
