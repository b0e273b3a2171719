"""The loss of every training sample: recorded once, whatever is resumed, and ranked by how long it stays high."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from cogvlm_ft.errors import DataError
from cogvlm_ft.tracking.sample_losses import SampleLosses, find_high_losses, read_sample_losses


def test_losses_of_all_ranks_and_parts_are_put_together(tmp_path: Path) -> None:
    SampleLosses(tmp_path, 0, 2, 0).add(1, 0, ["a", "b", "filler"], [6.0, 8.0, 0.0], [3, 2, 0])
    second = SampleLosses(tmp_path, 1, 2, 0)
    second.add(1, 0, ["a"], [4.0], [2])  # the other turns of the same photo
    second.add(2, 1, ["a", "c"], [3.0, math.nan], [5, 5])
    assert read_sample_losses(tmp_path) == {0: {"a": 2.0, "b": 4.0}, 1: {"a": 0.6}}
    assert read_sample_losses(tmp_path / "elsewhere") == {}


def test_a_resumed_training_records_nothing_twice(tmp_path: Path) -> None:
    losses = SampleLosses(tmp_path, 0, 1, 0)
    for step in (1, 2, 3):
        losses.add(step, 0, [f"s{step}"], [1.0], [1])
    with losses.path.open("a") as file:
        file.write('{"step": 4, "epo')  # killed while it wrote
    assert set(read_sample_losses(tmp_path)[0]) == {"s1", "s2", "s3"}
    SampleLosses(tmp_path, 0, 1, 2).add(3, 0, ["s3"], [5.0], [1])
    rows = [json.loads(line) for line in losses.path.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 5.0)]


def test_files_of_more_ranks_before_are_cut_back_too(tmp_path: Path) -> None:
    for rank in range(3):
        losses = SampleLosses(tmp_path, rank, 3, 0)
        losses.add(1, 0, [f"first {rank}"], [1.0], [1])
        losses.add(2, 0, [f"second {rank}"], [1.0], [1])
    for rank in range(2):
        SampleLosses(tmp_path, rank, 2, 1)
    assert set(read_sample_losses(tmp_path)[0]) == {"first 0", "first 1", "first 2"}


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    path = SampleLosses(tmp_path, 0, 1, 0).path
    path.write_text("[1, 2]\n")
    with pytest.raises(DataError, match=r"rank-00000\.jsonl cannot be read"):
        read_sample_losses(tmp_path)


def test_high_is_what_was_high_in_every_epoch() -> None:
    usual = {f"s{i}": 1.0 for i in range(9)}
    losses = {
        0: {**usual, "wrong": 9.0, "learned": 9.0, "forgotten": 0.5},
        1: {**usual, "wrong": 4.0, "learned": 4.0, "forgotten": 5.0},
        2: {**usual, "wrong": 6.0, "learned": 0.9, "forgotten": 5.0, "new": 7.0},
    }
    (found,) = find_high_losses(losses, 5)
    assert (found.key, found.ratio, found.per_token) == ("wrong", 4.0, ((0, 9.0), (1, 4.0), (2, 6.0)))


def test_only_the_last_three_epochs_count_and_the_worst_come_first() -> None:
    usual = {f"s{i}": 2.0 for i in range(9)}
    losses = {epoch: {**usual, "a": 8.0, "b": 0.1 if epoch == 0 else 12.0, "c": 3.0} for epoch in range(4)}
    assert [(high.key, high.ratio) for high in find_high_losses(losses, 2)] == [("b", 6.0), ("a", 4.0)]
    assert find_high_losses({0: losses[0]}, 5) == find_high_losses({}, 5) == []
