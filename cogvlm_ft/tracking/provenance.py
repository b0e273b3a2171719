"""Find out which code runs, and by which command, without the network and without recording secrets."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

CODE = Path(__file__).resolve().parents[2]
GIT_TIMEOUT_S = 20
COMMAND_NOT_KEPT = "command not kept"
"""Replaces a command in the records of a run."""

_PASSWORD = re.compile(r"(?<=://)[^/@\s]+@")  # scheme://user:password@host
_QUERY = re.compile(r"(://[^\s'\"?,\]}]*)\?[^\s'\",\]}]+")  # scheme://host/path?token=...
_COMMAND = re.compile(r"(?<!\w)pipe:[^\n]*")
_ONLY_COMMAND = re.compile(r"([\w.]+=)?pipe:.*", re.DOTALL)


@dataclass(frozen=True)
class GitState:
    """dirty: tracked files differ from the commit. remote_url: without a password in it; None if there is no remote."""

    commit: str
    dirty: bool
    remote_url: str | None


def provenance() -> dict[str, Any]:
    """Return the command, and the code's commit (None outside a git checkout)."""
    code = git_state()
    facts = {"commit": code.commit, "dirty": code.dirty} if code else None
    return {"command": shlex.join(without_passwords(sys.argv)), "code": facts}


@cache
def git_state(folder: Path = CODE) -> GitState | None:
    """Return None if `folder` is not the top of a git checkout: a repository around it belongs to something else."""
    top = _git(folder, "rev-parse", "--show-toplevel")
    commit = _git(folder, "rev-parse", "HEAD")
    if not top or not commit or Path(top).resolve() != folder.resolve():
        return None
    dirty = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    remote = _git(folder, "config", "--get", "remote.origin.url")
    return GitState(commit, dirty, without_passwords(remote) if remote else None)


def _git(folder: Path, *arguments: str) -> str | None:
    """Run a git command that only reads; None if it fails. GIT_* of the caller may name another repository."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1"}
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=GIT_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def has_password() -> bool:
    """Check whether the command line holds an address with a password or a query, or a command."""
    return any(without_passwords(argument) != argument for argument in sys.argv)


def without_passwords(value: Any) -> Any:
    """Copy a value, or lists and dicts of values, leaving user, password and query out of addresses.

    A command (`pipe:`) is not kept: what is read back from a file would be run.
    """
    if isinstance(value, str):
        if command := _ONLY_COMMAND.fullmatch(value):
            return f"{command[1] or ''}{COMMAND_NOT_KEPT}"
        return _COMMAND.sub(COMMAND_NOT_KEPT, _QUERY.sub(r"\1", _PASSWORD.sub("", value)))
    if isinstance(value, dict):
        return {key: without_passwords(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_passwords(part) for part in value]
    return value
