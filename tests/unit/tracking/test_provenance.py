"""Which code ran, read from real git repositories."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cogvlm_ft.tracking.provenance import (
    COMMAND_NOT_KEPT,
    GitState,
    git_state,
    has_password,
    provenance,
    without_passwords,
)


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    (folder / "package").mkdir(parents=True)
    (folder / "package" / "a.py").write_text("a = 1\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    git_state.cache_clear()
    return folder


def test_the_commit_of_the_code_and_whether_it_was_changed(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "another"))  # as in a git hook
    assert git_state(repository) == GitState(commit, dirty=False, remote_url=None)
    (repository / "runs").mkdir()
    (repository / "runs" / "metrics.jsonl").write_text("")  # what is not tracked is no change of the code
    git_state.cache_clear()
    assert git_state(repository) == GitState(commit, dirty=False, remote_url=None)
    (repository / "package" / "a.py").write_text("a = 2\n")
    git_state.cache_clear()
    assert git_state(repository) == GitState(commit, dirty=True, remote_url=None)


def test_the_address_of_the_code_has_no_password(repository: Path) -> None:
    git(repository, "remote", "add", "origin", "https://me:token@host/code.git")
    state = git_state(repository)
    assert state and state.remote_url == "https://host/code.git"


def test_a_repository_around_the_code_is_not_the_code_s(repository: Path, tmp_path: Path) -> None:
    assert git_state(repository / "package") is None
    assert git_state(tmp_path) is None


def test_without_git_there_is_no_state(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(repository))
    assert git_state(repository) is None


def test_the_command_line_without_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "data.shards=https://me:pa55@host/x", "tracking.name=a b"])
    assert provenance()["command"] == "launch/train.py data.shards=https://host/x 'tracking.name=a b'"
    assert has_password()
    for secret, kept in (
        ("data.shards=https://host/a.tar?sig=pa55", "data.shards=https://host/a.tar"),
        ("data.shards=[{path: 's3://b/a?k=pa55', weight: 2}]", "data.shards=[{path: 's3://b/a', weight: 2}]"),
        ("data.shards=pipe:curl -H pa55 \\\n pa55", f"data.shards={COMMAND_NOT_KEPT}"),
        ("data.shards=[a, pipe:curl pa55]", f"data.shards=[a, {COMMAND_NOT_KEPT}"),
    ):
        monkeypatch.setattr(sys, "argv", ["launch/train.py", secret, "seed=1"])
        assert provenance()["command"] == shlex.join(["launch/train.py", kept, "seed=1"]) and has_password()
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "data.shards=https://host/a@b", "a=b@c"])
    assert not has_password()


def test_passwords_are_taken_out_of_every_part_of_a_config() -> None:
    config = {"shards": [{"path": "http://u:p@h:80/a", "weight": 2.0}, "s3://k@bucket/b"], "mail": "a@b.c", "n": None}
    cleaned = {"shards": [{"path": "http://h:80/a", "weight": 2.0}, "s3://bucket/b"], "mail": "a@b.c", "n": None}
    assert without_passwords(config) == cleaned
