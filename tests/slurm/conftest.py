"""One virtual cluster and one undisturbed training for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, started_cluster, why_impossible
from jobs import Job, submit, training_settings

REQUIRED = "COGVLM_REQUIRE_SLURM"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    problem = why_impossible()
    if problem and os.environ.get(REQUIRED):
        pytest.fail(f"{REQUIRED} is set, and {problem}; `make slurm` installs what is missing")
    if problem:
        pytest.skip(f"{problem}; `make slurm` installs what is missing")
    with started_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def settings(shards: Path, start_model: Path) -> tuple[str, ...]:
    return training_settings(shards, start_model)


@pytest.fixture(scope="session")
def reference(cluster: Cluster, settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A training that nothing happens to."""
    job = submit(cluster, tmp_path_factory.mktemp("undisturbed") / "run", *settings)
    job.wait_for_end()
    return job
