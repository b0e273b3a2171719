"""Pinned memory is not rounded up: programs settle it before torch is imported, and only where torch can do it."""

from __future__ import annotations

import math
import os

import pytest
import torch

from cogvlm_ft import pinned_memory
from cogvlm_ft.command_line import exit_code
from cogvlm_ft.pinned_memory import EXACT, VARIABLES, allocate_pinned_exactly, allocated_bytes, rounded_up_to


def test_powers_of_two_by_hand() -> None:
    assert allocated_bytes([1, 3, 4, 5, 2**30 + 1], math.inf) == 1 + 4 + 4 + 8 + 2**31
    assert allocated_bytes([5, 2**20, 2**20 + 1], 2**20) == 8 + 2**20 + 2**20 + 1
    assert allocated_bytes([0, 7], 0.0) == 7


def test_every_program_settles_it_before_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    seen = {}
    exit_code(lambda: seen.update(os.environ))
    assert seen["PYTORCH_ALLOC_CONF"] == EXACT and rounded_up_to(seen) == 2**20


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("PYTORCH_ALLOC_CONF", "expandable_segments:True", math.inf),
        ("PYTORCH_CUDA_ALLOC_CONF", "pinned_max_cached_size_mb:64, expandable_segments:True", 64 * 2**20),
    ],
)
def test_the_users_own_setting_counts(name: str, value: str, limit: float) -> None:
    environment = {name: value}
    allocate_pinned_exactly(environment)
    assert environment == {name: value} and rounded_up_to(environment) == limit


def test_an_older_torch_would_refuse_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_memory, "version", lambda _: "2.12.1+cu130")
    environment: dict[str, str] = {}
    allocate_pinned_exactly(environment)
    assert not environment and rounded_up_to(environment) == math.inf


@pytest.mark.parametrize("option", [option.partition(":")[0] for option in EXACT.split(",")])
def test_torch_reads_the_options(option: str) -> None:
    with pytest.raises(ValueError, match="sto"):  # C++ fails to read a number; an option unknown here is skipped
        torch._C._accelerator_setAllocatorSettings(f"{option}:x")
