"""What happens to Slurm jobs: each function submits jobs, disturbs them, and returns once they are over.

All of them run at the same time (conftest.py), so none may touch the jobs or nodes of another: only
`preempt_and_lose_node` uses node3 and node4, of which it takes everything that runs there.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import yaml
from cluster import Cluster
from jobs import NUM_STEPS, Job, submit

HANG_TIMEOUT_S = 40  # more than any rank takes to start beside all the other jobs
ASKED = "a signal to stop"
AGAIN = "queueing it again"
OWN_NODES = "--nodelist=node[3-4]"
AFTER_NAME = "cogvlm-ft-after"
SWEEP = {"slow": 1e-4, "fast": 2e-3}  # run -> learning rate


def undisturbed(cluster: Cluster, folder: Path, settings: tuple[str, ...]) -> Job:
    """Train without any disturbance: the reference of all other situations."""
    job = submit(cluster, folder / "run", *settings)
    job.wait_for_end()
    return job


def meet_time_limit(cluster: Cluster, folder: Path, settings: tuple[str, ...]) -> Job:
    """Let a job meet its time limit once.

    The limit is lowered at step 4, to one or two minutes from then: Slurm sends the signal 60 s before it, and checks
    every 30 s only. The ranks are stopped until then.
    """
    options = ("--time=00:30:00", "--signal=B:USR1@60")
    for number in range(3):  # on a busy machine, the ranks may be stopped too late
        job = submit(cluster, folder / f"run{number}", *settings, "tracking.mode=offline", options=options)
        with job.paused_at(4):
            is_in_time = job.last_step < NUM_STEPS - 4  # the log may be behind the ranks
            if is_in_time:
                limit_time(job, job.run_minutes + 2)
                job.wait_for_log(ASKED)
        if is_in_time:
            break
        job.wait_for_end()
    job.wait_for_log(AGAIN)
    limit_time(job, 30)
    job.wait_for_end()
    return job


def limit_time(job: Job, minutes: int) -> None:
    """Set the time limit, again until it is accepted: a job that is still completing cannot be changed."""

    def is_accepted() -> bool:
        job.cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes}", check=False)
        return job.cluster.job(job.number).get("TimeLimit") == f"00:{minutes:02}:00"

    job.cluster.wait_until(is_accepted, f"job {job.number} has {minutes} minutes")


def kill_stop_and_requeue(cluster: Cluster, folder: Path, settings: tuple[str, ...]) -> Job:
    """Kill one rank in attempt 1, stop one in attempt 2, requeue attempt 3 by hand; attempt 4 finishes."""
    job = submit(cluster, folder / "run", *settings, f"train.hang_timeout_s={HANG_TIMEOUT_S}")
    with job.paused_at(4) as ranks:
        ranks[0].kill()
    job.wait_for_attempt(2)
    ranks = job.wait_for_ranks()
    job.wait_for_step(8)
    ranks[1].send_signal(signal.SIGSTOP)
    job.wait_for_attempt(3)
    with job.paused_at(12):
        cluster.run("scontrol", "requeue", job.number)
    job.wait_for_end()
    return job


def stop_and_chain(cluster: Cluster, folder: Path, settings: tuple[str, ...]) -> tuple[Job, Job]:
    """Send TERM to the script of the first job of a chain."""
    first = submit(cluster, folder / "run", *settings)
    second = submit(cluster, folder / "run", *settings, options=(f"--dependency=afterany:{first.number}",))
    with first.paused_at(4):
        cluster.run("scancel", "--batch", "--signal=TERM", first.number)
        first.wait_for_log(ASKED)
    first.wait_for_end()
    second.wait_for_end()
    return first, second


def mistype_a_key(cluster: Cluster, folder: Path, settings: tuple[str, ...]) -> Job:
    job = submit(cluster, folder / "run", *settings, "train.lrr=1")
    job.wait_for_end("FAILED")
    return job


def crash_at_every_start(cluster: Cluster, folder: Path, settings: tuple[str, ...]) -> list[Job]:
    """Submit an array of two jobs with a Python that cannot even start."""
    options = ("--array=0-1", "--output=slurm-%A_%a.log", "--export=ALL,PYTHON=false")
    array = submit(cluster, folder / "run", *settings, options=options)
    jobs = [Job(cluster, f"{array.number}_{task}", array.output_dir) for task in (0, 1)]
    for job in jobs:
        job.wait_for_end("FAILED")
    return jobs


def preempt_and_lose_node(cluster: Cluster, folder: Path, settings: tuple[str, ...]) -> Job:
    """Preempt a job by an urgent one in attempt 1, and switch off one of its nodes in the attempt after it."""
    job = submit(cluster, folder / "run", *settings, options=(OWN_NODES,))
    with job.paused_at(4):
        everything = ("--partition=urgent", "--nodes=2", "--gres=gpu:4", "--output=/dev/null", OWN_NODES)
        urgent = cluster.run("sbatch", "--parsable", *everything, "--wrap=true")
        job.wait_for_log(ASKED)
    cluster.wait_until(lambda: cluster.job(urgent)["JobState"] == "COMPLETED", "the urgent job ends")
    job.wait_for_attempt(2)
    job.wait_for_step(8)
    cluster.power_off("node4")
    cluster.wait_until(lambda: cluster.nodes("down") == ["node4"], "Slurm marks node4 as down")
    cluster.power_on("node4")
    job.wait_for_end()
    return job


def sweep_and_after(cluster: Cluster, folder: Path, settings: tuple[str, ...]) -> tuple[Path, str]:
    """Submit an array of two training jobs, with an evaluation and an export after each; return the runs' folder and
    what `launch/submit.py` printed.
    """
    sweep = [{"name": name, "settings": [f"train.lr={lr}"]} for name, lr in SWEEP.items()]
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    (folder / "cluster.yaml").write_text(
        "{partition: main, gpus_per_node: 1, cpus_per_task: 1, time: '10', options: ['--exclude=node[3-4]']}\n"
    )
    command = [sys.executable, "launch/submit.py", "--cluster", folder / "cluster.yaml", "--sweep"]
    command += [folder / "sweep.yaml", "--after", *settings, "train.max_steps=3", f"output_dir={folder / 'runs'}"]
    printed = cluster.run(*command, timeout_s=400)
    queued = ("squeue", "--noheader", f"--name={AFTER_NAME}")
    cluster.wait_until(lambda: not cluster.run(*queued), "evaluations and exports are over", 900, 1)
    return folder / "runs", printed
