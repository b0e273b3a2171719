"""What the variables of launchers mean, and which GPU is a rank's own."""

from __future__ import annotations

import pytest
import torch

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.runtime.distributed import device_index, ranks_of_launcher
from cogvlm_ft.runtime.tf32 import allow_tf32

ADDRESS = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
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
        pytest.param({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0), id="one rank needs no address"),
    ],
)
def test_ranks_of_a_launcher(environment: dict[str, str], expected: tuple[int, int, int]) -> None:
    assert ranks_of_launcher(environment) == expected


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        pytest.param(SRUN, "srun started 8 ranks", id="srun"),
        pytest.param(OPEN_MPI, "Open MPI started 4 ranks", id="mpirun"),
        pytest.param(INTEL_MPI, "PMI_SIZE=2", id="PMI"),
        pytest.param({**SRUN, "MASTER_ADDR": "node1"}, "found no MASTER_PORT; expected", id="no port"),
        pytest.param({**TORCHRUN, "MASTER_ADDR": ""}, "found no MASTER_ADDR and no MASTER_PORT", id="empty"),
    ],
)
def test_ranks_that_would_train_alone_are_refused(environment: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ranks_of_launcher(environment)


@pytest.mark.parametrize(("local_rank", "num_devices", "expected"), [(0, 8, 0), (7, 8, 7), (0, 1, 0), (5, 1, 0)])
def test_the_gpu_of_a_rank(local_rank: int, num_devices: int, expected: int) -> None:
    assert device_index(local_rank, num_devices) == expected


def test_too_few_gpus_for_the_ranks() -> None:
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES: rank 4 of its node sees 4 GPUs"):
        device_index(4, 4)


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_set_for_products_and_convolutions(allowed: bool) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        allow_tf32(allowed)
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (allowed, allowed)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
