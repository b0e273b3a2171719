"""What the variables of launchers mean, and which GPU is a rank's own."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import psutil
import pytest
import torch

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.runtime import distributed
from cogvlm_ft.runtime.cores import NODE_NUMBERS, THREADS_VARIABLE, node_id, threads_of
from cogvlm_ft.runtime.distributed import check_gpus, device_index, init_distributed, ranks_of_launcher, share_cores
from cogvlm_ft.runtime.engine import ranks_of_each
from cogvlm_ft.runtime.outcome import OUTCOME_VARIABLE
from cogvlm_ft.runtime.ports import PORTS, check_address, free_port
from cogvlm_ft.runtime.tf32 import allow_tf32

ADDRESS = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
JSRUN = {"JSM_NAMESPACE_RANK": "3", "JSM_NAMESPACE_SIZE": "6", "JSM_NAMESPACE_LOCAL_RANK": "1"}
INTEL_MPI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        pytest.param({}, (0, 1, 0), id="none"),
        pytest.param({**TORCHRUN, **ADDRESS}, (3, 4, 1), id="torchrun"),
        pytest.param({**SRUN, **ADDRESS}, (5, 8, 1), id="srun"),
        pytest.param({**OPEN_MPI, **ADDRESS}, (2, 4, 0), id="Open MPI"),
        pytest.param({**INTEL_MPI, **ADDRESS}, (1, 2, 1), id="Intel MPI"),
        pytest.param({**SRUN, **TORCHRUN, **ADDRESS}, (3, 4, 1), id="torchrun in srun"),
        pytest.param({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1, 0), id="in the batch script, without srun"),
        pytest.param({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0), id="srun --pty"),
        pytest.param({**SRUN, **OPEN_MPI, "SLURM_STEP_NUM_TASKS": "1", **ADDRESS}, (2, 4, 0), id="mpirun in salloc"),
        pytest.param({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "8", **ADDRESS}, (5, 8, 1), id="srun --mpi=pmi2"),
        pytest.param({"PMI_RANK": "5", "PMI_SIZE": "8", "PALS_LOCAL_RANKID": "1", **ADDRESS}, (5, 8, 1), id="PALS"),
        pytest.param({**JSRUN, **ADDRESS}, (3, 6, 1), id="jsrun of LSF"),
        pytest.param({**SRUN, "PMIX_RANK": "5", **ADDRESS}, (5, 8, 1), id="srun --mpi=pmix"),
        pytest.param({"RANK": "1", "WORLD_SIZE": "2", **ADDRESS}, (1, 2, None), id="local rank unknown"),
        pytest.param({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0), id="one rank needs no address"),
    ],
)
def test_ranks_of_a_launcher(environment: dict[str, str], expected: tuple[int, int, int | None]) -> None:
    assert ranks_of_launcher(environment) == expected


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        pytest.param(SRUN, "srun started 8 ranks", id="srun"),
        pytest.param(OPEN_MPI, "Open MPI started 4 ranks", id="mpirun"),
        pytest.param(INTEL_MPI, "PMI_SIZE=2", id="PMI"),
        pytest.param({**SRUN, "MASTER_ADDR": "node1"}, "found no MASTER_PORT; expected", id="no port"),
        pytest.param({"PMIX_RANK": "0"}, "PMIX_RANK=0: found no number of ranks; expected RANK", id="PMIx"),
        pytest.param({"RANK": "3", "MASTER_ADDR": "node1"}, "RANK=3: found no number of ranks", id="no size"),
        pytest.param({"WORLD_SIZE": "2", **ADDRESS}, "WORLD_SIZE=2: found no RANK", id="no rank"),
        pytest.param({**TORCHRUN, "RANK": "4", **ADDRESS}, "RANK=4: found WORLD_SIZE=4; expected numbers", id="rank"),
        pytest.param({**TORCHRUN, "MASTER_ADDR": ""}, "found no MASTER_ADDR and no MASTER_PORT", id="empty"),
    ],
)
def test_ranks_that_would_train_alone_are_refused(environment: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ranks_of_launcher(environment)


@pytest.mark.parametrize(
    ("local_rank", "num_devices", "expected"), [(0, 8, 0), (7, 8, 7), (0, 1, 0), (5, 1, 0), (None, 1, 0)]
)
def test_the_gpu_of_a_rank(local_rank: int | None, num_devices: int, expected: int) -> None:
    assert device_index(local_rank, num_devices) == expected


def test_deepspeed_would_not_use_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    check_gpus()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(ConfigError, match="DS_ACCELERATOR=cpu: found a GPU, on which DeepSpeed would not train"):
        check_gpus()


def test_too_few_gpus_for_the_ranks() -> None:
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES: rank 4 of its node sees 4 GPUs"):
        device_index(4, 4)
    with pytest.raises(ConfigError, match="LOCAL_RANK: found none, and 8 GPUs; expected this"):
        device_index(None, 8)


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_set_for_products_and_convolutions(allowed: bool) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        allow_tf32(allowed)
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (allowed, allowed)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_a_port_outside_the_range_of_connections() -> None:
    first, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert first < 32768 or max(PORTS) < first, "Linux starts there by default"
    assert free_port() in PORTS
    script = (Path(__file__).resolve().parents[3] / "slurm/ranks.sh").read_text()
    assert f"{PORTS.start} + (" in script and f"% {len(PORTS)})" in script


@pytest.mark.parametrize(
    ("host", "port", "named"),
    [
        ("127.0.0.1", "", "MASTER_PORT='': found no port"),
        ("127.0.0.1", "auto", "MASTER_PORT='auto': found no port"),
        ("127.0.0.1", "99999", "MASTER_PORT='99999': found no port"),
        ("node[01-04]", "29500", r"MASTER_ADDR='node\[01-04\]': found no host"),
        ("no-such-host.invalid", "29500", "found no host of this name"),
    ],
)
def test_an_address_at_which_rank_0_cannot_be(host: str, port: str, named: str) -> None:
    check_address({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": " 29500\n"})
    with pytest.raises(ConfigError, match=named):
        check_address({"MASTER_ADDR": host, "MASTER_PORT": port})


def test_a_rank_alone_listens_on_its_own_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_ADDR", "node-of-another-job.invalid")
    monkeypatch.setenv("MASTER_PORT", "")
    distributed._fill_environment()
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and int(os.environ["MASTER_PORT"]) in PORTS


def test_a_port_that_is_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", free_port()))
        other.listen()
        port = str(other.getsockname()[1])
        given = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=f"MASTER_PORT={port}: found in use .*expected .*--master_port [0-9]+"):
            init_distributed()
        monkeypatch.setenv(OUTCOME_VARIABLE, "outcome")
        with pytest.raises(torch.distributed.DistNetworkError):  # slurm/train.sbatch tries another port
            init_distributed()


def test_nodes_with_one_host_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NODE_NUMBERS:
        monkeypatch.delenv(name, raising=False)
    alone = node_id()
    assert alone == node_id()
    for name in NODE_NUMBERS:
        monkeypatch.setenv(name, "1")
        assert node_id() != alone
        monkeypatch.delenv(name)
    monkeypatch.setattr(socket, "gethostname", lambda: "another container")
    assert node_id() != alone


def test_ranks_of_each_node() -> None:
    assert ranks_of_each(["a", "a", "b", "b"]) == 2
    with pytest.raises(ConfigError, match="found 3 and 1 ranks on the nodes"):
        ranks_of_each(["a", "a", "a", "b"])
    with pytest.raises(ConfigError, match="ranks that alternate"):
        ranks_of_each(["a", "b", "a", "b"])


def test_cores_of_a_rank() -> None:
    together = [("a", range(16))] * 4 + [("b", range(16))] * 4
    assert threads_of("a", range(16), together) == 4
    bound = [("a", range(8)), ("a", range(8, 16))]  # as Slurm binds tasks
    assert threads_of("a", range(8), bound) == 8
    assert threads_of("a", range(2), [("a", range(2))] * 8) == 1


@pytest.mark.parametrize(
    ("given", "of_launcher", "expected"),
    [(None, None, "8"), ("1", None, "8"), ("1", "1", "1"), ("5", "5", "5")],
    ids=["deepspeed", "torchrun", "set to 1", "set to 5"],
)
def test_threads_of_an_optimizer_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    given: str | None,
    of_launcher: str | None,
    expected: str,
) -> None:
    """torchrun sets 1 where its own environment has none; what the user sets is kept."""
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    launcher = {} if of_launcher is None else {THREADS_VARIABLE: of_launcher}
    monkeypatch.setattr(psutil.Process, "environ", lambda _: launcher)
    monkeypatch.delenv(THREADS_VARIABLE, raising=False)
    if given is not None:
        monkeypatch.setenv(THREADS_VARIABLE, given)
    before = torch.get_num_threads()
    try:
        share_cores("optimizer on the CPU")
        assert os.environ[THREADS_VARIABLE] == expected
    finally:
        torch.set_num_threads(before)
        os.environ.pop(THREADS_VARIABLE, None)  # monkeypatch restores what it was
    assert f"optimizer on the CPU: {expected} threads per rank" in caplog.text
