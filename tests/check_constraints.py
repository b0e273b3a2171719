"""Resolve the pins of constraints.txt for every supported Python, without installing anything (make check-constraints).

Each version is resolved by its own interpreter, because markers and wheels depend on it. Interpreters are looked for on
PATH and in pyenv's folder. Where the index has no torch for a version, that is reported, and every other pin is checked
to exist. Exit codes: 0 all versions resolve, 1 one does not, or its interpreter is missing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
EXTRAS = "dev,serve,workspace,bench,tiles"
NO_TORCH = re.compile(r"No matching distribution found for torch\b")


def find_python(version: str) -> str | None:
    """Return an interpreter of this version that runs; a pyenv shim of a version that is not active does not."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))]
    for python in filter(None, candidates):
        if subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0:
            return python
    return None


def resolve(python: str, *arguments: str) -> str:
    """Resolve without installing; return an empty text, or pip's errors."""
    command = [python, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith(("ERROR", "    "))]
    return "" if done.returncode == 0 else "\n".join(errors) or done.stderr


def check(version: str) -> str:
    """Return what is wrong for this version; empty if nothing is."""
    python = find_python(version)
    if python is None:
        return f"no python{version} with pip found"
    errors = resolve(python, "-c", "constraints.txt", f".[{EXTRAS}]")
    if not NO_TORCH.search(errors):
        return errors
    print(f"{version}  the index has no torch for it; checking that the other pins exist", flush=True)
    pins = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pin for pin in pins if not pin.startswith("torch==")))
        file.flush()
        return resolve(python, "--no-deps", "-r", file.name)


def main() -> int:
    failed = []
    for version in VERSIONS:
        errors = check(version)
        print(f"{version}  {errors or 'resolved'}", flush=True)
        failed += [version] if errors else []
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
