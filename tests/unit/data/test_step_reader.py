"""What a rank does when its data cannot be read: wait, begin again from the same position, or ask all to save."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from servers import Server, serve
from test_loader import GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZES, SEED, assert_equal, build_dataset

from cogvlm_ft.checkpoints.checkpoint import TrainState
from cogvlm_ft.data import loader, patience
from cogvlm_ft.data.collate import collate
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.plan import SamplePlan
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.errors import ConfigError, ServerError
from cogvlm_ft.model import CogVLMTokenizer
from cogvlm_ft.runtime.stop_signals import StopRequest
from cogvlm_ft.train.step_reader import StepReader

STATE = TrainState(config_sha256="", data_sha256="")


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Serve the shards to a process that does not wait long for them."""
    monkeypatch.setattr(patience, "LOADER_RETRY_S", 0.0)
    monkeypatch.setattr(patience, "_DELAYS_S", (0.05,))
    monkeypatch.setattr(patience, "_LONGEST_DELAY_S", 0.05)
    with serve(Server(shards)) as server:
        yield server


def run_of(server: Server, shards: Path, tokenizer: CogVLMTokenizer, retry_s: float) -> Any:
    index = load_index(server.url, "train")
    return SimpleNamespace(
        config=SimpleNamespace(
            data=SimpleNamespace(num_workers=1, retry_s=retry_s),
            train=SimpleNamespace(micro_batch_size=MICRO_BATCH_SIZES[1]),
        ),
        dataset=build_dataset(shards, tokenizer, reader=ShardReader(index)),
        plan=SamplePlan(len(index), GLOBAL_BATCH_SIZE, SEED),
    )


def test_a_server_that_comes_back_costs_nothing_and_one_that_does_not_asks_all_to_save(
    server: Server, shards: Path, tokenizer: CogVLMTokenizer
) -> None:
    run, stop_request = run_of(server, shards, tokenizer, retry_s=20), StopRequest()
    with StepReader(run, STATE) as reader:
        undisturbed, _ = reader.next_step(STATE, stop_request)
    server.failures = 10**9
    threading.Timer(0.5, setattr, (server, "failures", 0)).start()
    with StepReader(run, STATE) as reader:
        batches, waited_s = reader.next_step(STATE, stop_request)
    assert waited_s > 0.4 and not stop_request.seen
    for batch, expected in zip(batches, undisturbed, strict=True):
        assert_equal(batch, expected)

    run.config.data.retry_s, server.failures = 0.1, 10**9
    with StepReader(run, STATE) as reader:
        assert reader.next_step(STATE, stop_request)[0] == []
    assert stop_request.seen
    with pytest.raises(ServerError, match=r"^http://.*\.tar: HTTP 503; gave up after 1 attempt"):
        stop_request.raise_error()


def test_a_small_shm_ends_the_run_with_the_remedy(
    server: Server, shards: Path, tokenizer: CogVLMTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that sends batches would only print it, and the rank would wait for the batch."""

    def fail(_tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    stop_request = StopRequest()
    with StepReader(run_of(server, shards, tokenizer, retry_s=1), STATE) as reader:
        assert reader.next_step(STATE, stop_request)[0] == []
    with pytest.raises(ConfigError, match=r"^data\.num_workers: found .* MiB free in /dev/shm .*--shm-size=16g"):
        stop_request.raise_error()


def test_too_many_open_files_end_the_run_with_the_remedy(
    server: Server, shards: Path, tokenizer: CogVLMTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This too would only be printed by the thread that sends batches."""

    def leave_few(examples: Any) -> Any:
        num_open = sum(1 for _ in Path("/proc/self/fd").iterdir())
        resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 10, limits[1]))
        return collate(examples)

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(loader, "collate", leave_few)
    expected = pytest.raises(RuntimeError, match=r"Too many open files: .*`ulimit -n 65536`")
    with StepReader(run_of(server, shards, tokenizer, retry_s=1), STATE) as reader, expected:
        reader.next_step(STATE, StopRequest())
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits
