"""Write a folder at once or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.plain_files import sync, sync_tree


def check_new(out: Path) -> None:
    """Raise CheckpointError if `--out` exists."""
    if out.exists():
        raise CheckpointError(f"--out {out} exists; expected a new folder. Choose another name")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield the path of a folder to make, which becomes `out` when the block ends without an error."""
    check_new(out)
    partial = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)  # of a program that was killed
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        sync_tree(partial)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(out.parent)
