"""bench/gpu.py is ready for a GPU: all its parts run on CPU in toy sizes, and a second call keeps what is green."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import REPOSITORY, run_program

PROGRAM = REPOSITORY / "bench" / "gpu.py"
PARTS = ("layers", "engine", "offload", "two_ranks", "write_17b", "use_17b", "speed", "signals", "compile", "memory")


@pytest.mark.slow
def test_every_part_runs_on_cpu_and_is_kept(tmp_path: Path) -> None:
    arguments = [PROGRAM, "--out", tmp_path, "--device", "cpu", "--tiny"]
    done = run_program(arguments, timeout_s=500)
    assert done.returncode == 0 and done.stdout.endswith("10 of 10 parts are green\n"), done.stdout + done.stderr
    assert [line.partition(" (")[0] for line in done.stdout.splitlines() if "): python" in line] == list(PARTS)
    written = {name: json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) for name in PARTS}
    assert all(part["machine"]["torch"] and part["seconds"] < 290 for part in written.values())

    red = written["layers"]["lines"][0]
    red["is_green"] = False
    (tmp_path / "layers.json").write_text(json.dumps(written["layers"]), encoding="utf-8")
    again = run_program([*arguments, "--parts", "layers", "engine"])
    assert "layers (kept)" not in again.stdout and "engine (kept)" in again.stdout
    assert "2 of 2 parts are green" in again.stdout
