"""What meets a full disk: rows wait and are whole then; programs end with one line and leave nothing half done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ranks import OWN_NAMESPACE, run_program

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


@pytest.mark.parametrize(
    ("program", "size"), [("convert_sat", "300k"), ("predict", "100k"), ("build", "300k"), ("review", "300k")]
)
def test_programs_end_with_one_line(program: str, size: str, start_model: Path, shards: Path, tmp_path: Path) -> None:
    """Torch writes to a mapped file, where a lack of room would be SIGBUS, and SQLite has errors of its own."""
    if subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody make a mount namespace: no small disk to fill")
    disk, scenes = tmp_path / "disk", shards.with_name("scenes")
    disk.mkdir()
    source = [
        "--format",
        "jsonl",
        "--images",
        scenes,
        "--annotations",
        scenes / "annotations.jsonl",
        "--out",
        disk / "x",
    ]
    arguments = {
        "convert_sat": ["launch/convert_sat.py", "--model", start_model, "--out", disk / "x", "--dtype", "fp32"],
        "predict": [
            "launch/predict.py",
            "--model",
            start_model,
            "--image",
            scenes,
            "--prompt",
            "?",
            "--out",
            disk / "x",
        ],
        "build": ["shards/build.py", *source, "--workers", "1"],
        "review": ["shards/review.py", *source],
    }[program]
    mount = f'mount -t tmpfs -o size={size} tmpfs "{disk}"; head -c 60k /dev/zero >"{disk}/other"'
    done = run_program([OWN_NAMESPACE, mount, "true", *arguments])
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    assert any(words in done.stderr.splitlines()[-1] for words in ("No space", "free on this disk", "disk is full"))
