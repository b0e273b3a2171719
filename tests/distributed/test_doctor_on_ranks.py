"""The doctor on real ranks: communication, and the problems that only several machines have."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from ranks import OWN_NAMESPACE, REPOSITORY, fork_server, free_port, started

pytestmark = pytest.mark.slow
TIMEOUT_S = 200


def arguments(start_model: Path, shards: Path, output_dir: Path, *settings: str) -> list[str]:
    usual = [f"model.path={start_model}", f"data.shards={shards}", f"output_dir={output_dir}", "data.num_workers=0"]
    usual += ["deepspeed=configs/deepspeed/zero3_tiny.json", "tracking.mode=disabled"]
    return ["launch/doctor.py", *usual, *settings]


@pytest.fixture(autouse=True)
def own_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))


def test_two_ranks(start_model: Path, shards: Path, tmp_path: Path) -> None:
    """Only rank 0 prints; each sample is read by one rank; rates are measured."""
    with started([*arguments(start_model, shards, tmp_path / "run"), "--all-shards"], 2, tmp_path / "logs") as ranks:
        codes = ranks.wait(TIMEOUT_S)
    said, silent = (log.read_text() for log in ranks.logs)
    assert codes == [0, 0] and silent.strip() == "", ranks.output()
    assert "ranks: 2 on 1 host: " in said and "nothing red: ready to start" in said
    assert "train: 33 samples, all read and decoded" in said
    rates = re.search(r"gloo, messages of 32 MiB: all_gather ([\d.]+) GB/s per rank, all_reduce ([\d.]+)", said)
    assert rates and all(0.01 < float(rate) < 1000 for rate in rates.groups()), said
    assert "16 images per step = 2 ranks x 1 x 8 passes" in said
    assert not (tmp_path / "run").exists()


def test_two_ranks_with_a_run_that_cannot_fit(start_model: Path, shards: Path, tmp_path: Path) -> None:
    """Every rank ends with 1, although only rank 0 knows why."""
    settings = ["train.micro_batch_size=100000", "train.global_batch_size=300000"]
    with started(arguments(start_model, shards, tmp_path / "run", *settings), 2, tmp_path / "logs") as ranks:
        codes = ranks.wait(TIMEOUT_S)
    said = ranks.logs[0].read_text()
    assert codes == [1, 1], ranks.output()
    assert "red     plan: training takes " in said and "train.micro_batch_size=1" in said
    assert "train.global_batch_size: 300000 is not a multiple of 2 ranks x train.micro_batch_size=100000" in said
    assert said.endswith("2 red\n") and "Traceback" not in ranks.output()


def test_two_nodes_that_share_neither_output_dir_nor_shards(start_model: Path, shards: Path, tmp_path: Path) -> None:
    """Run two hosts in namespaces; the second has its own disk at output_dir and an empty folder for the shards."""
    if subprocess.run(["unshare", "--map-root-user", "--mount", "--uts", "true"], check=False).returncode != 0:
        pytest.skip("no user namespaces here")
    output_dir = tmp_path / "run"
    output_dir.mkdir()
    port = free_port()
    outputs = []
    processes = []
    for rank in range(2):
        own_disks = f"mount -t tmpfs none {output_dir} && mount -t tmpfs none {shards} && " if rank else ""
        before = f"{own_disks}hostname node{rank}"
        environment = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        outputs.append(tmp_path / f"rank-{rank}.log")
        program = [OWN_NAMESPACE, before, "true", *arguments(start_model, shards, output_dir)]
        processes.append(
            fork_server().start(program, {**os.environ, **environment}, REPOSITORY, outputs[-1], outputs[-1])
        )
    try:
        codes = [process.wait(TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = outputs[0].read_text()
    assert codes == [1, 1], said + outputs[1].read_text()
    assert "ranks: 2 on 2 hosts: node0 x 1, node1 x 1" in said and "green   clocks: at most " in said
    assert f"red     output folder: output_dir={output_dir} of node0 is not that of node1" in said
    assert f"red     shards: {shards}: found nothing; expected shards named " in said and "(seen on node1)" in said
    assert "GB/s per rank" in said and said.endswith("2 red\n")
