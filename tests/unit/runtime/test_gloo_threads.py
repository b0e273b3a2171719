"""The interpreter exits only when gloo's threads hold no tensor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cogvlm_ft.runtime.gloo_threads import THREAD_NAME, wait_until_at_rest


@contextmanager
def thread_named_like_gloos(work: Callable[[threading.Event], None]) -> Iterator[None]:
    stop, named = threading.Event(), threading.Event()

    def run() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(THREAD_NAME, encoding="utf-8")
        named.set()
        work(stop)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert named.wait(10)
        yield
    finally:
        stop.set()
        thread.join()


def busy(stop: threading.Event) -> None:
    while not stop.is_set():
        pass


def wakes_often(stop: threading.Event) -> None:
    while not stop.wait(0.001):
        pass


def test_a_process_without_such_threads_is_at_rest() -> None:
    assert wait_until_at_rest(0)


def test_a_sleeping_thread_is_at_rest() -> None:
    with thread_named_like_gloos(lambda stop: stop.wait() and None):
        assert wait_until_at_rest(10)


def test_a_working_thread_is_waited_for() -> None:
    for work in (busy, wakes_often):
        with thread_named_like_gloos(work):
            assert not wait_until_at_rest(0.1)
        assert wait_until_at_rest(10)
