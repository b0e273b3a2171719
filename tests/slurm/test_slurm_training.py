"""slurm/train.sbatch on a real Slurm: whatever happens to a training job, its weights are those of the reference."""

from __future__ import annotations

import re
from concurrent.futures import Future

import pytest
from cluster import Cluster
from jobs import NUM_STEPS, Job, assert_same_result
from ranks import read_metrics
from situations import ASKED, HANG_TIMEOUT_S

from cogvlm_ft.checkpoints.checkpoint import list_checkpoints, read_state

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.xdist_group("slurm"), pytest.mark.timeout(1200)]


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


def test_mistakes_are_not_tried_again(cluster: Cluster, mistype_a_key: Future[Job]) -> None:
    job = mistype_a_key.result()
    assert "train.lrr" in job.log and "refused: fix what the message above names" in job.log
    found = cluster.job(job.number)
    assert (found["Restarts"], found["ExitCode"]) == ("0", "2:0")


def test_endless_crashes_end(cluster: Cluster, crash_at_every_start: Future[list[Job]]) -> None:
    """Check each task of the array for itself: a requeue must not hit the others."""
    for job in crash_at_every_start.result():
        assert cluster.job(job.number)["Restarts"] == "2", job.log
        # Slurm may kill the second task before it has failed itself: the exit code is that of either.
        assert re.search(r"crashed with exit code \d+ \(2 of 3 without a checkpoint\)", job.log), job.log
        assert "crashed 3 times in a row without a checkpoint in between: given up" in job.log


def test_stop_for_good_and_chain(cluster: Cluster, reference: Job, stop_and_chain: Future[tuple[Job, Job]]) -> None:
    """TERM to the script alone: not queued again, but the next job of a chain continues."""
    first, second = stop_and_chain.result()
    assert "stopped and saved. Submit the same command" in first.log
    assert cluster.job(first.number)["Restarts"] == "0"
    assert "resuming from" in second.log
    assert_same_result(second.output_dir, reference.output_dir)


def test_killed_rank(reference: Job, kill_stop_and_requeue: Future[Job]) -> None:
    job = kill_stop_and_requeue.result()
    assert "crashed with exit code" in job.attempt_log(1)
    assert "(0 of 3 without a checkpoint)" in job.attempt_log(1)
    assert "resuming from" in job.attempt_log(2)
    assert_same_result(job.output_dir, reference.output_dir)


def test_hanging_rank(reference: Job, kill_stop_and_requeue: Future[Job]) -> None:
    """Its peer waits for it, gives up, and srun ends both."""
    job = kill_stop_and_requeue.result()
    assert f"made no progress for {HANG_TIMEOUT_S} s" in job.attempt_log(2)
    assert "crashed with exit code" in job.attempt_log(2)
    assert "resuming from" in job.attempt_log(3)
    assert_same_result(job.output_dir, reference.output_dir)


def test_requeue_by_hand(cluster: Cluster, reference: Job, kill_stop_and_requeue: Future[Job]) -> None:
    job = kill_stop_and_requeue.result()
    assert "crashed" not in job.attempt_log(3)
    assert "resuming from" in job.attempt_log(4)
    assert cluster.job(job.number)["Restarts"] == "3"
    assert_same_result(job.output_dir, reference.output_dir)


def test_time_limit(cluster: Cluster, reference: Job, meet_time_limit: Future[Job]) -> None:
    job = meet_time_limit.result()
    assert cluster.job(job.number)["Restarts"] == "1"
    assert_same_result(job.output_dir, reference.output_dir)
    (resumed,) = re.findall(r"resuming from .* \(step (\d+)\)", job.log)
    assert 4 <= int(resumed) < NUM_STEPS
    # One W&B run: a folder for each attempt, under one id.
    ids = [path.name.rpartition("-")[2] for path in (job.output_dir / "wandb").glob("offline-run-*")]
    state = read_state(list_checkpoints(job.output_dir / "checkpoints")[-1])
    assert ids == [state.wandb_run_id] * 2


def test_preemption(reference: Job, preempt_and_lose_node: Future[Job]) -> None:
    job = preempt_and_lose_node.result()
    assert ASKED in job.attempt_log(1)
    assert "resuming from" in job.attempt_log(2)
    assert_same_result(job.output_dir, reference.output_dir)


def test_lost_node(cluster: Cluster, reference: Job, preempt_and_lose_node: Future[Job]) -> None:
    job = preempt_and_lose_node.result()
    num_restarts = int(cluster.job(job.number)["Restarts"])
    assert num_restarts >= 2  # more where Slurm ends what it takes for a remnant of the lost attempt
    assert "finished" not in job.attempt_log(2)
    assert "resuming from" in job.attempt_log(num_restarts + 1)
    assert_same_result(job.output_dir, reference.output_dir)
