"""Run a program in mount and host name namespaces of its own, as another node or on another disk.

Usage: own_namespace.py BEFORE AFTER PROGRAM ARGUMENT...; BEFORE and AFTER are shell commands that run in the namespaces
before the program and after its end.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import subprocess
import sys
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWUSER = 0x00020000, 0x04000000, 0x10000000


def main() -> None:
    before, after, *sys.argv = sys.argv[1:]
    enter()
    subprocess.run(["sh", "-ec", f"mount --make-rprivate / && {before}"], check=True)
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        subprocess.run(["sh", "-ec", after], check=True)


def enter() -> None:
    """Enter new namespaces, in which this user is root."""
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWUTS):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, content in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(content)


if __name__ == "__main__":
    main()
