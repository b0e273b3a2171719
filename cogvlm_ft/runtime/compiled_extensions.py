"""Choose the folder in which DeepSpeed compiles its optimizer for the CPU: the home folder may not be writable."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from cogvlm_ft.errors import ConfigError

VARIABLE = "TORCH_EXTENSIONS_DIR"

logger = logging.getLogger(__name__)


def build_root() -> Path:
    """Return the folder that torch uses."""
    from torch.utils.cpp_extension import get_default_build_root  # imports setuptools, which takes half a second

    return Path(os.environ.get(VARIABLE) or get_default_build_root())


def problem_of(root: Path) -> str:
    """Return why nothing can be written there, "" if it can. Creates the folder."""
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=root):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def use_writable_folder() -> None:
    """Let torch compile in a folder of this user in the node's temporary folder if its own cannot be written.

    Raises ConfigError if that is not possible either, or belongs to another user, whose programs would be loaded.
    """
    root = build_root()
    problem = problem_of(root)
    if not problem:
        return
    other = Path(tempfile.gettempdir()) / f"torch_extensions-{os.getuid()}"
    its_problem = problem_of(other) or ("" if _is_mine(other) else "it belongs to another user, or others may write it")
    if its_problem:
        raise ConfigError(
            f"{VARIABLE}={root}: {problem}; {other}: {its_problem}; expected a folder in which DeepSpeed can compile. "
            f"Set {VARIABLE} to one that every node can write"
        )
    logger.warning(
        "%s cannot be written (%s): DeepSpeed compiles in %s; set %s to change it", root, problem, other, VARIABLE
    )
    os.environ[VARIABLE] = str(other)


def _is_mine(folder: Path) -> bool:
    status = folder.lstat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022 and not folder.is_symlink()
