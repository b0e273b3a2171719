"""Rows that meet a full disk: none is lost, none is half there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys, threading, time
from pathlib import Path
from cogvlm_ft.tracking.metrics_log import append_text

disk = Path(sys.argv[1])
rows, filler = disk / "rows.jsonl", disk / "filler"
append_text(rows, "first\\n")
try:
    with filler.open("wb") as file:
        while True:
            file.write(b"x" * 4096)
except OSError:
    pass
long_row = "y" * 9000 + "\\n"
threading.Timer(1.5, filler.unlink).start()
began = time.monotonic()
append_text(rows, long_row)
assert time.monotonic() - began > 0.5, "it was not full"
assert rows.read_text() == "first\\n" + long_row
"""


def test_a_row_waits_for_room_and_is_whole_then(tmp_path: Path) -> None:
    """On a real full disk, a small one in a mount namespace, where something big is deleted after a while."""
    outside = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*outside, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody make a mount namespace: no small disk to fill")
    script = f'mount -t tmpfs -o size=256k tmpfs "{tmp_path}" && exec "$@"'
    command = [*outside, "bash", "-c", script, "-", sys.executable, "-c", PROGRAM, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
