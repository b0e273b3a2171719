"""The doctor on disks, full and forbidden ones."""

from __future__ import annotations

import errno
import os
import resource
import stat
from pathlib import Path

import pytest
from examining import Examine

from cogvlm_ft.doctor.checks import DISK, FOLDER, LEFTOVERS, SHARING


def test_an_output_folder_that_cannot_be(run_checks: Examine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    num_red, said = run_checks([FOLDER, SHARING, DISK, LEFTOVERS], f"output_dir={tmp_path / 'file' / 'run'}")
    assert num_red == 1 and "red     output folder: " in said and "Not a directory" in said


def test_a_disk_that_takes_no_more(run_checks: Examine, tmp_path: Path) -> None:
    """A limit on the size of files does what a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        num_red, said = run_checks([FOLDER, DISK, LEFTOVERS])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert num_red == 1 and "File too large" in said and "make room" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_a_killed_examination_left_is_removed(run_checks: Examine, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    old, young = (tmp_path / "run" / f".tmp-doctor-{name}" for name in ("old", "young"))
    old.touch()
    young.touch()
    os.utime(old, (old.stat().st_mtime - 7200,) * 2)
    run_checks([FOLDER, DISK, LEFTOVERS])
    assert list((tmp_path / "run").iterdir()) == [young]


@pytest.mark.slow
def test_no_room_for_the_checkpoints(run_checks: Examine) -> None:
    num_red, said = run_checks([FOLDER, DISK, LEFTOVERS], "checkpoint.keep_last=1000000000")
    assert num_red == 1 and "red     disk: " in said and "1000000002 more checkpoints take" in said


def test_a_file_system_that_cannot_sync_folders(run_checks: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    num_red, said = run_checks([FOLDER, DISK, LEFTOVERS])
    assert num_red == 0 and "its file system cannot sync folders" in said
