"""The same launch/train.py under every launcher; mistakes are reported before anything heavy starts."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from ranks import REPOSITORY, fork_server, free_port, read_metrics, run_program
from tiny import AS_SHIPPED, run_settings, short_run_settings

from cogvlm_ft.checkpoints.checkpoint import list_checkpoints, read_state

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
LAUNCHED_BY = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(**more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHED_BY and not k.startswith("SLURM_")}
    return {**clean, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **more}


def test_torchrun(shards: Path, start_model: Path, tmp_path: Path) -> None:
    """`deepspeed` trains below, in test_hostfile.py and in test_demo.py."""
    settings = short_run_settings(shards, start_model, tmp_path / "run", *AS_SHIPPED)
    launcher = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port())]
    result = subprocess.run(
        [*launcher, "launch/train.py", *settings],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "run", "train")] == [1, 2]


def test_ranks_of_a_launcher_that_has_ended_save_and_end(shards: Path, start_model: Path, tmp_path: Path) -> None:
    """`deepspeed` ends on SIGTERM without its ranks, which would go on and hold GPUs and port."""
    settings = run_settings(shards, start_model, tmp_path / "run", "train.max_steps=500", "train.epochs=100")
    command = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port()), "launch/train.py"]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            [*command, *settings, "evaluate.before_training=false", "data.num_workers=1"],
            cwd=REPOSITORY,
            env=environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    output_dir = tmp_path / "run"
    try:
        wait_until(lambda: (output_dir / "metrics.jsonl").exists() and len(read_metrics(output_dir, "train")) > 1)
        launcher.terminate()
        assert launcher.wait(30) != 0
        wait_until(lambda: not processes_of(output_dir))
    finally:
        for process in processes_of(output_dir):
            process.kill()
    last = list_checkpoints(output_dir / "checkpoints")[-1]
    assert read_state(last).step == read_metrics(output_dir, "train")[-1]["step"] < 500


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes_of(output_dir: Path) -> list[psutil.Process]:
    """Return every process whose command line names this folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if f"output_dir={output_dir}" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_srun_environment(shards: Path, start_model: Path, tmp_path: Path) -> None:
    """Set what `srun` sets for each task, and the address that slurm/train.sbatch exports."""
    command = ["launch/train.py", *short_run_settings(shards, start_model, tmp_path / "run")]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "SLURM_STEP_NUM_TASKS": "2"}
    log = tmp_path / "log"
    log.touch()
    ranks = [
        fork_server().start(
            command, environment(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **shared), REPOSITORY, log, log
        )
        for rank in range(2)
    ]
    try:
        codes = [rank.wait() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], log.read_text()
    assert len(read_metrics(tmp_path / "run", "train")) == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.lrr=1", "train.lrr"),
        ("model.path=nowhere", "nowhere"),
        (
            "train.global_batch_size=3",
            "train.global_batch_size: 3 is not a multiple of 1 ranks x train.micro_batch_size=2",
        ),
        ("data.val_split=test", "test"),
        ("model.freeze=[model.visoin.*]", "model.visoin.*"),
        ("train.monitor=iou", "mean_iou"),
    ],
)
def test_mistakes_are_explained(setting: str, message: str, shards: Path, start_model: Path, tmp_path: Path) -> None:
    arguments = [*short_run_settings(shards, start_model, tmp_path / "run"), setting]
    result = run_program(["launch/train.py", *arguments], environment=environment())
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
