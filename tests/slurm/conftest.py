"""One virtual cluster; the jobs of all tests of this folder run on it at the same time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import situations
from cluster import Cluster, started_cluster, why_impossible
from jobs import Job, training_settings

REQUIRED = "COGVLM_REQUIRE_SLURM"
LONGEST_FIRST = (
    "meet_time_limit",
    "kill_stop_and_requeue",
    "undisturbed",
    "preempt_and_lose_node",
    "stop_and_chain",
    "mistype_a_key",
    "crash_at_every_start",
    "sweep_and_after",
)


@pytest.fixture(scope="session")
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for the situations; closed after the cluster, whose end also ends every wait of theirs."""
    with ThreadPoolExecutor(len(LONGEST_FIRST)) as pool:
        yield pool


@pytest.fixture(scope="session")
def cluster(pool: ThreadPoolExecutor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    problem = why_impossible()
    if problem and os.environ.get(REQUIRED):
        pytest.fail(f"{REQUIRED} is set, and {problem}; `make slurm` installs what is missing")
    if problem:
        pytest.skip(f"{problem}; `make slurm` installs what is missing")
    with started_cluster(tmp_path_factory.mktemp("slurm") / "cluster", num_nodes=4) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def settings(shards: Path, start_model: Path) -> tuple[str, ...]:
    return training_settings(shards, start_model)


def _started(situation: Callable[..., Any]) -> Any:
    """Return a fixture: the future of what the situation returns."""

    @pytest.fixture(scope="session")
    def started(
        pool: ThreadPoolExecutor,
        cluster: Cluster,
        settings: tuple[str, ...],
        tmp_path_factory: pytest.TempPathFactory,
    ) -> Future[Any]:
        return pool.submit(situation, cluster, tmp_path_factory.mktemp(situation.__name__), settings)

    return started


meet_time_limit = _started(situations.meet_time_limit)
kill_stop_and_requeue = _started(situations.kill_stop_and_requeue)
undisturbed = _started(situations.undisturbed)
preempt_and_lose_node = _started(situations.preempt_and_lose_node)
stop_and_chain = _started(situations.stop_and_chain)
mistype_a_key = _started(situations.mistype_a_key)
crash_at_every_start = _started(situations.crash_at_every_start)
sweep_and_after = _started(situations.sweep_and_after)


@pytest.fixture(scope="session", autouse=True)
def all_started(request: pytest.FixtureRequest) -> None:
    """Submit at once the jobs of every situation that a selected test uses."""
    used = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    for name in LONGEST_FIRST:
        if name in used:
            request.getfixturevalue(name)


@pytest.fixture(scope="session")
def reference(undisturbed: Future[Job]) -> Job:
    """Return a training job that nothing happened to, after its end."""
    return undisturbed.result()
