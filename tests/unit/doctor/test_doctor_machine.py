"""The doctor on versions, machines and build locks, each on a real thing that is really broken."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
from examining import Examine

from cogvlm_ft.doctor import build_locks
from cogvlm_ft.doctor.checks import CLOCKS, GPUS, HOST, LOCKS, RANKS, VERSIONS
from cogvlm_ft.doctor.examination import (
    Check,
    Examination,
    Reading,
)


def test_a_package_of_another_version(run_checks: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, version in (("transformers", "4.46.3"), ("deepspeed", "0.15.0")):
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    num_red, said = run_checks([VERSIONS])
    assert num_red == 2
    assert "transformers: found 4.46.3" in said and "<6,>=5.20" in said
    assert "deepspeed: found 0.15.0" in said and "do: pip install -c constraints.txt -e ." in said


def test_versions_that_differ_between_nodes(run_checks: Examine) -> None:
    def read(examination: Examination) -> object:
        return VERSIONS.read(examination)

    def judge(examination: Examination, seen: list[Reading]) -> list:
        other = seen[0].facts._replace(installed={**seen[0].facts.installed, "torch": "2.9.0"}, commit="abc")
        return VERSIONS.judge(examination, [seen[0]._replace(host="node1"), Reading(1, "node2", other)])

    num_red, said = run_checks([Check("versions", read, judge)])
    assert num_red == 1 and "on node1, 2.9.0 on node2" in said and "the same on every rank" in said
    assert "yellow  versions: the code is" in said


def test_ranks_that_are_spread_unevenly(run_checks: Examine) -> None:
    seen = [Reading(0, "node1"), Reading(1, "node1"), Reading(2, "node2")]
    num_red, said = run_checks([Check("ranks", lambda _: None, lambda e, _: RANKS.judge(e, seen))])
    assert num_red == 0 and "yellow  ranks: 3 on 2 hosts: node1 x 2, node2 x 1" in said


def test_clocks_that_differ(run_checks: Examine) -> None:
    seen = [Reading(0, "node1", 1000.0), Reading(1, "node2", 1007.5)]
    _, said = run_checks([Check("clocks", lambda _: None, lambda e, _: CLOCKS.judge(e, seen))])
    assert "yellow  clocks: node2 is 7.5 s ahead of node1" in said


def test_few_open_files(run_checks: Examine) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = len(list(Path("/proc/self/fd").iterdir())) + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        num_red, said = run_checks([HOST])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert num_red == 0 and f"yellow  host: open files: {limit} allowed" in said and "ulimit -n 1024" in said


def test_too_many_loader_processes_for_the_cores_and_for_shared_memory(run_checks: Examine) -> None:
    num_red, said = run_checks([HOST], "data.num_workers=1000000")
    assert num_red == 1 and "red     host: /dev/shm" in said and "data.num_workers=0" in said
    assert "yellow  host: cores" in said


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="there are GPUs here")
def test_without_gpus_it_says_so(run_checks: Examine) -> None:
    assert "yellow  GPUs: none" in run_checks([GPUS])[1]


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """Of a build that was killed an hour ago."""
    path = tmp_path / "extensions" / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    os.utime(path, (path.stat().st_mtime - 3600,) * 2)
    return path


def test_a_stale_build_lock_is_red_and_goes_if_asked(run_checks: Examine, lock: Path) -> None:
    num_red, said = run_checks([LOCKS])
    assert num_red == 1 and f"{lock} is 60 min old, and no process here holds it" in said and f"rm {lock}" in said
    assert lock.exists()
    num_red, said = run_checks([LOCKS], fix=True)
    assert num_red == 0 and "removed" in said and not lock.exists()
    assert run_checks([LOCKS])[1].startswith("green   build locks: none in ")


def test_a_build_lock_that_is_held_stays(run_checks: Examine, lock: Path) -> None:
    with lock.open():
        num_red, said = run_checks([LOCKS], fix=True)
    assert num_red == 0 and f"held by process {os.getpid()}" in said and lock.exists()


def test_a_young_build_lock_stays(run_checks: Examine, lock: Path) -> None:
    os.utime(lock)
    num_red, said = run_checks([LOCKS], fix=True)
    assert num_red == 0 and "yellow  build locks: " in said and lock.exists()


def test_a_folder_of_builds_that_cannot_be_written(
    run_checks: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "extensions"))
    num_red, said = run_checks([LOCKS])
    assert num_red == 0 and "yellow  build locks: " in said and "set TORCH_EXTENSIONS_DIR" in said


def test_the_default_folder_of_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert build_locks.build_root().name == "torch_extensions"
