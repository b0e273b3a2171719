"""Submit a training run as Slurm jobs: read the cluster, check that the run can fit, build the sbatch commands."""

from __future__ import annotations

import logging
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cogvlm_ft.config import find_preset
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.pinned_memory import rounded_up_to
from cogvlm_ft.plain_files import read_bytes
from cogvlm_ft.planning.data_turns import largest_pass
from cogvlm_ft.planning.evaluation_time import EvaluationTime, time_evaluation
from cogvlm_ft.planning.memory import Cluster
from cogvlm_ft.planning.preflight import count_images, judge_start
from cogvlm_ft.planning.step_time import H100_TFLOPS, Speeds, StepTime, number_format, time_step
from cogvlm_ft.settings import Config
from cogvlm_ft.written_values import values_of_yaml
from cogvlm_ft.yaml_text import MAX_BYTES, decode_yaml

logger = logging.getLogger(__name__)


@dataclass
class SlurmCluster:
    """Settings of slurm/cluster.yaml, which explains the keys."""

    partition: Optional[str] = None
    account: Optional[str] = None
    qos: Optional[str] = None
    nodes: int = 1
    gpus_per_node: int = 8
    cpus_per_task: int = 8
    time: str = "24:00:00"
    signal_s: int = 300
    gpu_memory_gib: float = 79.0
    host_memory_gib: Optional[float] = None
    options: list[str] = field(default_factory=list)


def load_cluster(path: Path, overrides: Mapping[str, object]) -> SlurmCluster:
    """Load the file, with those overrides that are not None."""
    if not path.is_file():
        raise ConfigError(f"--cluster {path}: no such file")
    given = {key: value for key, value in overrides.items() if value is not None}
    try:
        written = values_of_yaml(decode_yaml(read_bytes(path, MAX_BYTES)), SlurmCluster)
        merged = OmegaConf.merge(OmegaConf.structured(SlurmCluster), OmegaConf.create(written), given)
        cluster: SlurmCluster = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(f"--cluster {path}: {error.full_key}: {str(error).splitlines()[0]}") from error
    except (OSError, ValueError, ConfigError) as error:
        raise ConfigError(f"--cluster {path}: {error}") from error
    for name in ("nodes", "gpus_per_node", "cpus_per_task", "signal_s", "gpu_memory_gib"):
        if not getattr(cluster, name) > 0:
            raise ConfigError(f"--cluster {path}: {name}={getattr(cluster, name)}; expected more than 0")
    return cluster


def check_plan(config: Config, cluster: SlurmCluster) -> str:
    """Return the estimate of launch/plan.py in a line; ConfigError if the job itself would refuse to start."""
    machines = Cluster(
        cluster.nodes,
        cluster.gpus_per_node,
        cluster.gpu_memory_gib,
        cluster.host_memory_gib,
        rounded_up_to=rounded_up_to(os.environ),
    )
    planner, estimate, verdict = judge_start(config, machines)
    summary = f"{machines.num_gpus} GPUs: {verdict.status}: {verdict.why}"
    speeds = Speeds(tflops=H100_TFLOPS[number_format(config)])
    sequences = largest_pass(config, planner.model_config)
    time = time_step(planner, estimate, sequences, speeds)
    evaluation = time_evaluation(planner, estimate, sequences, speeds)
    needed_s = max(time.step_s, evaluation.batch_s) + 2 * time.checkpoint_s
    if needed_s > cluster.signal_s:
        logger.warning(
            "signal_s=%d leaves no time to save: a step takes about %.0f s, a batch of an evaluation %.0f s, a save "
            "%.0f s, twice. Set it to %d",
            cluster.signal_s,
            time.step_s,
            evaluation.batch_s,
            time.checkpoint_s,
            needed_s + 60,
        )
    parts = [
        f"{summary}. A step takes about {time.step_s:.1f} s",
        f"a save {time.checkpoint_s:.0f} s",
        f"an evaluation {evaluation.num_batches} x {evaluation.batch_s:.0f} s",
    ]
    return ", ".join(parts) + _whole_run(config, time, evaluation)


def _whole_run(config: Config, time: StepTime, evaluation: EvaluationTime) -> str:
    """Return the time of the whole run as text; "" if the images can be counted only by reading the shards."""
    shards = config.data.shards
    is_built = isinstance(shards, str) and (Path(shards).expanduser() / "index.json").is_file()
    num_images = count_images(config) if is_built else None
    if num_images is None:
        return ""
    train, settings = config.train, config.evaluate
    num_steps = train.epochs * -(-num_images // train.global_batch_size)
    fraction = min(1.0, (train.max_steps or num_steps) / num_steps)
    num_evaluations = max(1, int(fraction * train.epochs / settings.every_epochs)) + settings.before_training
    run_s = fraction * train.epochs * time.epoch_s(num_images) + num_evaluations * evaluation.whole_s
    return f"; the whole run {run_s / 3600:.1f} h, with {num_evaluations} evaluations"


@dataclass(frozen=True)
class Submission:
    """Jobs to submit. arguments: of launch/train.py; num_tasks: entries of the sweep; chain: consecutive jobs.

    environment: of the jobs, for Slurm hands on that of sbatch; what this process has set for itself, such as
    DS_ACCELERATOR=cpu on a login node, is not for them. None: that of this process.
    """

    cluster: SlurmCluster
    arguments: list[str]
    output_dir: str
    sweep: Path | None = None
    num_tasks: int | None = None
    chain: int = 1
    after: bool = False
    environment: Mapping[str, str] | None = None


def submit(submission: Submission, *, dry_run: bool) -> Iterator[str]:
    """Submit the jobs one by one; yield each command, then the number of its job.

    With dry_run, only the commands, with JOB1, ... for the numbers. Raises ConfigError that names the jobs which are
    queued if a later one is refused.
    """
    numbers: list[str] = []
    for command in commands_of(submission, numbers):
        yield shlex.join(command)
        numbers.append(f"JOB{len(numbers) + 1}" if dry_run else run_sbatch(command, submission.environment, numbers))
        if not dry_run:
            yield f"job {numbers[-1]}"


def commands_of(submission: Submission, numbers: Sequence[str]) -> Iterator[list[str]]:
    """Yield the commands, each after the number of the job before it was appended to `numbers`."""
    for number in range(submission.chain):
        former = [f"--dependency=afterany:{numbers[-1]}"] if number else []
        yield [*sbatch_options(submission), *former, script("train"), *submission.arguments]
    if submission.after:
        kind = "afterok" if submission.num_tasks is None else "aftercorr"  # each task after the task of the same number
        sweep = [] if submission.sweep is None else ["--sweep", str(submission.sweep)]
        options = sbatch_options(submission, is_training=False)
        yield [*options, f"--dependency={kind}:{numbers[-1]}", script("after"), submission.output_dir, *sweep]


def script(name: str) -> str:
    """Return the path of a batch script: slurm/NAME.sbatch where that exists, else the packaged one."""
    return str(find_preset(f"slurm/{name}.sbatch", "slurm/*.sbatch", "--print-script "))


def sbatch_options(submission: Submission, *, is_training: bool = True) -> list[str]:
    """Return sbatch and its options, up to the script."""
    cluster = submission.cluster
    options = ["sbatch", "--parsable"]
    if is_training:
        options += [f"--nodes={cluster.nodes}", f"--time={cluster.time}", f"--signal=B:USR1@{cluster.signal_s}"]
    options += [f"--gres=gpu:{cluster.gpus_per_node}", f"--ntasks-per-node={cluster.gpus_per_node}"]
    options += [f"--cpus-per-task={cluster.cpus_per_task}"]
    for name in ("partition", "account", "qos"):
        value = getattr(cluster, name)
        options += [f"--{name}={value}"] if value else []
    if submission.num_tasks is not None:
        options += [f"--array=0-{submission.num_tasks - 1}", "--output=slurm-%A_%a.log"]
    return [*options, *cluster.options]


def run_sbatch(command: Sequence[str], environment: Mapping[str, str] | None = None, queued: Sequence[str] = ()) -> str:
    """Submit a job and return its number. queued: jobs that were submitted before it, for the message."""
    before = ""
    if queued:
        jobs = "job" if len(queued) == 1 else "jobs"
        before = (
            f". Queued before: {jobs} {', '.join(queued)}. Cancel with `scancel {' '.join(queued)}`, or submit "
            "only what is missing"
        )
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)
    except OSError as error:
        reason = "there is no sbatch here" if isinstance(error, FileNotFoundError) else f"sbatch: {error}"
        raise ConfigError(
            f"{reason}: submit on a node with Slurm, or print the commands with --dry-run{before}"
        ) from error
    if done.returncode:
        raise ConfigError(f"sbatch refused: {done.stderr.strip()}; the command: {shlex.join(command)}{before}")
    number = job_number(done.stdout)
    if number is None:
        raise ConfigError(
            f"sbatch printed {done.stdout.strip()!r}; expected the number of the job. It may be queued: check with "
            f"squeue --me{before}"
        )
    return number


def job_number(printed: str) -> str | None:
    """Return the job number that `sbatch --parsable` printed, in its last line that is a number.

    A site's banner may precede it, the name of the cluster may follow it after a semicolon.
    """
    numbers = [line.strip().partition(";")[0] for line in printed.splitlines()]
    return next((number for number in reversed(numbers) if re.fullmatch("[0-9]+", number)), None)
