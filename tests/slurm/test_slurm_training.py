"""slurm/train.sbatch on a real Slurm: whatever happens to a training, it ends with the weights it would have had."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import NUM_STEPS, Job, assert_same_result, submit
from ranks import read_metrics

from cogvlm_ft.checkpoints.checkpoint import list_checkpoints, read_state

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

ASKED = "a signal to stop"
AGAIN = "it is queued again"


@pytest.fixture(scope="module", autouse=True)
def time_limited(
    cluster: Cluster, reference: Job, settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Future[Job]]:
    """A job that meets its time limit, beside other tests: Slurm looks at limits every 30 s only, here 30 to 60 s after
    the start. Its ranks stand still from step 4 until then.
    """

    def meet_time_limit() -> Job:
        options = ("--time=00:02:00", "--signal=B:USR1@60")
        folder = tmp_path_factory.mktemp("time_limit") / "run"
        job = submit(cluster, folder, *settings, "tracking.mode=offline", options=options)
        with job.paused_at(4):
            job.wait_for_log(ASKED)
        job.wait_for_log(AGAIN)
        cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")  # the rest fits in, on any machine
        return job

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(meet_time_limit)


@pytest.fixture(scope="module", autouse=True)
def endless(cluster: Cluster, settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    """An array of two jobs with a Python that cannot even start."""
    options = ("--array=0-1", "--output=slurm-%A_%a.log", "--export=ALL,PYTHON=false")
    array = submit(cluster, tmp_path_factory.mktemp("endless"), *settings, options=options)
    return [Job(cluster, f"{array.number}_{task}", array.output_dir) for task in (0, 1)]


def test_two_nodes_train_together(reference: Job) -> None:
    job = reference.cluster.job(reference.number)
    assert (job["NumNodes"], job["NumTasks"], job["Restarts"]) == ("2", "2", "0")
    assert job["TresPerNode"] == "gres:gpu:1"
    assert [row["step"] for row in read_metrics(reference.output_dir, "train")] == list(range(1, NUM_STEPS + 1))
    state = read_state(list_checkpoints(reference.output_dir / "checkpoints")[-1])
    assert (state.step, state.world_size) == (NUM_STEPS, 2)
    assert "attempt 1 on node[1-2], 2 ranks" in reference.log
    left = [path.name for path in reference.cluster.checkout.glob(f".slurm-{reference.number}.*")]
    assert not left


def test_killed_rank(cluster: Cluster, reference: Job, settings: tuple[str, ...], tmp_path: Path) -> None:
    job = submit(cluster, tmp_path / "run", *settings)
    job.wait_for_step(5)
    job.ranks()[0].kill()
    job.wait_for_end()
    assert "crashed with exit code" in job.log and "(0 of 3 without a checkpoint)" in job.log
    assert cluster.job(job.number)["Restarts"] == "1"
    assert_same_result(job.output_dir, reference.output_dir)


def test_hanging_rank(cluster: Cluster, reference: Job, settings: tuple[str, ...], tmp_path: Path) -> None:
    """Its peer waits for it, gives up, and srun ends both."""
    job = submit(cluster, tmp_path / "run", *settings, "train.hang_timeout_s=15")
    job.wait_for_step(5)
    job.ranks()[1].send_signal(signal.SIGSTOP)
    job.wait_for_log("made no progress for 15 s")
    job.wait_for_end()
    assert "crashed with exit code" in job.log
    assert_same_result(job.output_dir, reference.output_dir)


def test_stop_for_good_and_chain(cluster: Cluster, reference: Job, settings: tuple[str, ...], tmp_path: Path) -> None:
    """TERM to the script alone: not queued again, but the next job of a chain goes on."""
    first = submit(cluster, tmp_path / "run", *settings)
    second = submit(cluster, tmp_path / "run", *settings, options=(f"--dependency=afterany:{first.number}",))
    with first.paused_at(4):
        cluster.run("scancel", "--batch", "--signal=TERM", first.number)
        first.wait_for_log(ASKED)
    first.wait_for_end()
    assert "stopped and saved: submit the same command" in first.log
    assert cluster.job(first.number)["Restarts"] == "0"
    second.wait_for_end()
    assert "resuming from" in second.log
    assert_same_result(tmp_path / "run", reference.output_dir)


def test_mistakes_are_not_tried_again(cluster: Cluster, settings: tuple[str, ...], tmp_path: Path) -> None:
    job = submit(cluster, tmp_path / "run", *settings, "train.lrr=1")
    job.wait_for_end("FAILED")
    assert "train.lrr" in job.log and "refused: mend what the message above names" in job.log
    found = cluster.job(job.number)
    assert (found["Restarts"], found["ExitCode"]) == ("0", "2:0")


def test_requeue_by_hand(cluster: Cluster, reference: Job, settings: tuple[str, ...], tmp_path: Path) -> None:
    job = submit(cluster, tmp_path / "run", *settings)
    with job.paused_at(4):
        cluster.run("scontrol", "requeue", job.number)
    job.wait_for_end()
    assert cluster.job(job.number)["Restarts"] == "1"
    assert_same_result(job.output_dir, reference.output_dir)


def test_endless_crashes_end(cluster: Cluster, endless: list[Job]) -> None:
    """Each task of the array for itself: a requeue must not hit the others."""
    for job in endless:
        job.wait_for_end("FAILED")
        assert cluster.job(job.number)["Restarts"] == "2", job.log
        assert "crashed with exit code 1 (2 of 3 without a checkpoint)" in job.log
        assert "crashed 3 times in a row without a checkpoint in between: given up" in job.log


def test_time_limit(cluster: Cluster, reference: Job, time_limited: Future[Job]) -> None:
    job = time_limited.result()
    job.wait_for_end()
    assert cluster.job(job.number)["Restarts"] == "1"
    assert_same_result(job.output_dir, reference.output_dir)
    (resumed,) = re.findall(r"resuming from .* \(step (\d+)\)", job.log)
    assert 4 <= int(resumed) < NUM_STEPS
    # One W&B run: a folder for each attempt, under one id.
    ids = [path.name.rpartition("-")[2] for path in (job.output_dir / "wandb").glob("offline-run-*")]
    state = read_state(list_checkpoints(job.output_dir / "checkpoints")[-1])
    assert ids == [state.wandb_run_id] * 2


# From here on nothing may run beside a test: these happen to every job.


def test_preemption(cluster: Cluster, reference: Job, settings: tuple[str, ...], tmp_path: Path) -> None:
    job = submit(cluster, tmp_path / "run", *settings)
    with job.paused_at(4):
        everything = ("--partition=urgent", "--nodes=2", "--gres=gpu:4", "--output=/dev/null")
        urgent = cluster.run("sbatch", "--parsable", *everything, "--wrap=true")
        job.wait_for_log(ASKED)
    cluster.wait_until(lambda: cluster.job(urgent)["JobState"] == "COMPLETED", "the urgent job ends")
    job.wait_for_end()
    assert int(cluster.job(job.number)["Restarts"]) >= 1
    assert_same_result(job.output_dir, reference.output_dir)


def test_lost_node(cluster: Cluster, reference: Job, settings: tuple[str, ...], tmp_path: Path) -> None:
    job = submit(cluster, tmp_path / "run", *settings)
    job.wait_for_step(5)
    cluster.power_off("node2")
    cluster.wait_until(lambda: cluster.nodes("down") == ["node2"], "Slurm misses node2")
    cluster.power_on("node2")
    job.wait_for_end()
    assert int(cluster.job(job.number)["Restarts"]) >= 1
    assert_same_result(job.output_dir, reference.output_dir)
