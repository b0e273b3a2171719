"""What is asked of CUDA, seen without a GPU."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from cogvlm_ft.checkpoints.saver import CheckpointSaver
from cogvlm_ft.runtime import distributed
from cogvlm_ft.settings import CheckpointConfig
from cogvlm_ft.train import meter

GPU = torch.device("cuda", 3)


def test_the_thread_that_saves_uses_the_gpu_of_its_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without checkpoint.background it copies from the GPU; a new thread begins with GPU 0."""
    calls: list[tuple[str, object]] = []
    monkeypatch.setattr(distributed, "device", lambda: GPU)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: calls.append((threading.current_thread().name, device))
    )
    saver = CheckpointSaver(None, tmp_path, lambda _: None, CheckpointConfig(background=False))
    saver._writer.submit(lambda: None).result()
    saver._writer.shutdown()
    assert calls == [("checkpoint_0", GPU)]


def test_peak_memory_is_that_since_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = [8 * 2**30]
    monkeypatch.setattr(meter, "device", lambda: GPU)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 2 * 2**30))
    assert [meter.peak_memory_gib(), meter.peak_memory_gib()] == [8, 2]


def test_memory_of_an_evaluation_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[bool] = []
    monkeypatch.setattr(distributed, "device", lambda: GPU)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: released.append(True))
    distributed.release_unused_memory()
    assert released == [True]
