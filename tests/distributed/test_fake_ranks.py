"""Single ranks of jobs that no test machine can start: whatever its data, each issues the same collectives."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run

PROGRAM = Path(__file__).with_name("fake_ranks.py")


@pytest.mark.slow
def test_ranks_of_large_jobs_issue_the_same_collectives(shards: Path, start_model: Path, tmp_path: Path) -> None:
    """Of 9 images to evaluate rank 0 gets one, and the last rank none; they also differ in turns."""
    jobs = {32: (0, 31), 256: (0, 255)}
    named = [f"{num_ranks}:{','.join(map(str, ranks))}" for num_ranks, ranks in jobs.items()]
    run([PROGRAM, start_model, shards, tmp_path, *named], 1, tmp_path / "logs")
    for num_ranks, ranks in jobs.items():
        first, last = ((tmp_path / f"{num_ranks}-{rank}.txt").read_text().splitlines() for rank in ranks)
        assert first == last
        kinds = {line.partition(" ")[0] for line in first}
        assert {"all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "gather_object"} <= kinds
        assert len(first) > 400
