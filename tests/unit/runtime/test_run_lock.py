"""One training per folder: whoever owns it keeps it, and of those who find the owner gone one takes it over."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

import psutil
import pytest

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.runtime import owned_folder
from cogvlm_ft.runtime import run_lock as module
from cogvlm_ft.runtime.owned_folder import owned_run_folder
from cogvlm_ft.runtime.run_lock import Owner, Use, run_lock, this_process

NUM_STARTS = 100
FORK = multiprocessing.get_context("fork")


def leave(folder: Path, **changes: object) -> Path:
    """Write a lock as another process left it."""
    path = folder / ".lock-000007"
    path.write_text(json.dumps({**dataclasses.asdict(this_process()), **changes}))
    return path


def ended_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def lock_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_owner_is_named_and_its_folder_stays_its_own(tmp_path: Path) -> None:
    with run_lock(tmp_path / "run"):
        message = (
            rf"output_dir={tmp_path}/run: another training run is writing there: process {os.getpid()} on \S+; expected"
        )
        with pytest.raises(ConfigError, match=message), run_lock(tmp_path / "run"):
            pass
        assert lock_names(tmp_path / "run") == [".lock-000001"]
    with run_lock(tmp_path / "run"):
        assert lock_names(tmp_path / "run") == [".lock-000002"]


def test_a_message_names_what_the_folder_is_used_for(tmp_path: Path) -> None:
    use = Use("rehearsal", f"--out {tmp_path}", "--out")
    message = (
        rf"^--out {tmp_path}: another rehearsal is writing there: process {os.getpid()} on .* choose another --out$"
    )
    with run_lock(tmp_path, use), pytest.raises(ConfigError, match=message), run_lock(tmp_path, use):
        pass


def test_a_dead_process_of_this_machine_is_no_owner(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    leave(tmp_path, pid=ended_pid(), job="77")
    begun = time.monotonic()
    with run_lock(tmp_path):
        assert time.monotonic() - begun < 2
    assert "Slurm job 77, has ended; this run continues" in caplog.text


def test_a_pid_that_another_process_has_now_is_no_owner(tmp_path: Path) -> None:
    leave(tmp_path, started=1.0)
    with run_lock(tmp_path):
        pass


def test_a_requeued_job_takes_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    leave(tmp_path, machine="another", job="12", attempt=1)
    with run_lock(tmp_path):
        pass


@pytest.mark.parametrize("ending", ["beats", "is silent", "releases"])
def test_an_owner_on_another_host_is_observed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """Its clock may differ, so only changes count."""
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.2)
    path = leave(tmp_path, machine="another", host="node9", pid=1)
    os.utime(path, (1, 1))

    def change() -> None:
        if ending == "beats":
            os.utime(path, (2, 2))
        else:
            leave(tmp_path, machine="another", is_released=True)

    timer = threading.Timer(0.3, change)
    if ending != "is silent":
        timer.start()
    begun = time.monotonic()
    if ending == "beats":
        with pytest.raises(ConfigError, match="process 1 on node9"), run_lock(tmp_path):
            pass
    else:
        with run_lock(tmp_path):
            assert (time.monotonic() - begun > 1.1) == (ending == "is silent")


def test_a_number_of_restarts_that_is_none_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, expected in (("2", 2), ("", 0), ("abc", 0)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", given)
        assert this_process().attempt == expected


def test_what_is_no_lock_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WRITTEN_AFTER_S", 0)
    (tmp_path / ".lock-000003").write_text("{}")
    with pytest.raises(ConfigError, match=r"\.lock-000003: not a lock of a run"), run_lock(tmp_path):
        pass


def test_a_lock_that_is_being_written_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no hard links, the name is there before the content."""
    monkeypatch.setattr(module, "POLL_S", 0.02)
    (tmp_path / ".lock-000007").touch()
    writing = threading.Timer(0.1, lambda: leave(tmp_path))
    writing.start()
    with pytest.raises(ConfigError, match="another training run is writing there"), run_lock(tmp_path):
        pass
    writing.join()


def test_the_heartbeat_outlives_a_server_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.02)
    with run_lock(tmp_path) as (name, _):
        os.utime(tmp_path / name, (0, 0))
        with monkeypatch.context() as away:
            away.setattr(module, "_newest", lambda _: (_ for _ in ()).throw(OSError(errno.ESTALE, "stale")))
            time.sleep(0.1)
        os.utime(tmp_path / name, (0, 0))
        time.sleep(0.1)
        assert (tmp_path / name).stat().st_mtime > 0


def test_a_full_disk_leaves_no_half_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> bool:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "sync_open", full)
    with pytest.raises(ConfigError, match="No space left on device; expected a folder on a disk"), run_lock(tmp_path):
        pass
    assert not lock_names(tmp_path)


def test_an_owner_that_was_taken_over_ends_at_once(tmp_path: Path) -> None:
    """It was suspended for longer than others wait; both would write."""

    def own(begun: Event) -> None:
        module.HEARTBEAT_S = 0.05
        with run_lock(tmp_path):
            begun.set()
            time.sleep(30)

    begun = FORK.Event()
    process = FORK.Process(target=own, args=(begun,))
    process.start()
    assert begun.wait(20)
    leave(tmp_path)
    process.join(20)
    assert process.exitcode == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "has_links"), [("nothing", True), ("a dead owner", True), ("a released lock", False)]
)
def test_of_many_simultaneous_starts_exactly_one_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, has_links: bool
) -> None:
    if before != "nothing":
        leave(tmp_path, pid=ended_pid(), is_released=before == "a released lock")
    if not has_links:

        def refuse(*_: object) -> None:
            raise PermissionError("no hard links here")

        monkeypatch.setattr(Path, "hardlink_to", refuse)

    def start(together: Barrier, won: Event) -> None:
        together.wait(60)
        try:
            with run_lock(tmp_path):
                assert not won.is_set()
                won.set()
                together.wait(60)
        except ConfigError:
            together.wait(60)
            sys.exit(2)

    together, won = FORK.Barrier(NUM_STARTS), FORK.Event()
    processes = [FORK.Process(target=start, args=(together, won)) for _ in range(NUM_STARTS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sorted(process.exitcode for process in processes) == [0] + [2] * (NUM_STARTS - 1)


HOLDER = """
import sys, time
from pathlib import Path
from cogvlm_ft.runtime import run_lock
run_lock.HEARTBEAT_S = 0.5
with run_lock.run_lock(Path(sys.argv[1])):
    print("owns it", flush=True)
    time.sleep(300)
"""


@pytest.mark.slow
def test_two_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other host has its own processes, name and network; only its heartbeat tells whether it is alive."""
    namespaces = ["unshare", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts", "--net"]
    if subprocess.run([*namespaces, "true"], check=False).returncode:
        pytest.skip("no user namespaces here")
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.5)
    command = [*namespaces, "sh", "-c", 'hostname node9 && exec "$@"', "-", sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "owns it\n"
            with pytest.raises(ConfigError, match="process 1 on node9"), run_lock(tmp_path):
                pass
        finally:
            other.kill()
    with run_lock(tmp_path):
        assert lock_names(tmp_path) == [".lock-000002"]


def test_a_name_for_people() -> None:
    assert str(Owner("node1", "m", 3, 0.0, None, 0)) == "process 3 on node1"
    assert str(Owner("node1", "m", 3, 0.0, "12", 0)) == "process 3 on node1, Slurm job 12"


def test_a_folder_that_another_node_does_not_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a lock of the same number, of an earlier run on that node."""
    monkeypatch.setattr(owned_folder, "SHOWN_AFTER_S", 0.1)
    monkeypatch.setattr(owned_folder, "POLL_S", 0.01)
    shared, own = tmp_path / "shared", tmp_path / "own"
    with run_lock(own):
        pass
    with run_lock(shared) as lock:
        monkeypatch.setattr(owned_folder, "is_main", lambda: False)
        monkeypatch.setattr(owned_folder, "from_main", lambda _: (None, lock))
        with owned_run_folder(shared):
            pass
        with pytest.raises(ConfigError, match=f"output_dir={own}: found another folder on "), owned_run_folder(own):
            pass


def test_a_step_of_the_clock_loses_no_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time since 1970 at which a process started moves with the clock of the machine."""
    with run_lock(tmp_path):
        booted = psutil.boot_time()
        for name in ("psutil.boot_time", "psutil._pslinux.boot_time"):
            monkeypatch.setattr(name, lambda: booted + 3600)
        with pytest.raises(ConfigError, match="another training run is writing there"), run_lock(tmp_path):
            pass


def test_a_lock_of_an_earlier_version_is_one(tmp_path: Path) -> None:
    leave(tmp_path, started=psutil.Process().create_time())
    with pytest.raises(ConfigError, match="another training run is writing there"), run_lock(tmp_path):
        pass
