"""Conventions of every program: --help, --version, one line for a user's mistake, exit codes 0, 1 and 2."""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from cogvlm_ft import __version__
from cogvlm_ft.errors import CheckpointError, ConfigError, DataError, ServerError
from cogvlm_ft.pinned_memory import allocate_pinned_exactly
from cogvlm_ft.terminal import prepare_terminal, say

USER_ERRORS = (ConfigError, DataError, CheckpointError)
USER_ERROR_EXIT_CODE = 2
PATH_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}
WRONG_PATHS = {errno.ELOOP, errno.ENAMETOOLONG}  # whatever the disk does
PATH_ERRORS |= WRONG_PATHS | {errno.EINVAL}
DISK_ERRORS = {errno.EIO, errno.ESTALE, errno.ENXIO, errno.ETIMEDOUT, errno.ENOTCONN, errno.EREMOTEIO}
FULL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_UTF_8 = "surrogates not allowed"  # of codecs: bytes of a name that are not UTF-8
NO_HOME = "Could not determine home directory."  # of pathlib, such as for an account without a name in a container
ACTIVATE = "activate the environment first: source .venv/bin/activate"


def build_parser(doc: str | None, *, allow_abbrev: bool = True) -> argparse.ArgumentParser:
    """Build a parser whose --help opens with the program's docstring and ends with its part from "Examples:" on.

    In arguments of type Path, ~ is the home folder: shells leave it in --out=~/x and in quotes.
    """
    prepare_terminal()
    description, _, examples = (doc or "").partition("\nExamples:\n")
    parser = argparse.ArgumentParser(
        description=description.strip(),
        epilog=f"Examples:\n{examples.rstrip()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=allow_abbrev,
    )
    parser.register("type", Path, _path_from_home)
    parser.add_argument("--version", action="version", version=f"cogvlm-ft {__version__}")
    return parser


def _path_from_home(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: found no such home folder; write the path in full") from None


def add_settings(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add the arguments --config and key=value."""
    about = "YAML file of settings, or the name of a preset, such as grounding_490"
    parser.add_argument("--config", required=required, help=about)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that override those of --config")


def exit_code(work: Callable[[], int | None], *, explain_paths: bool = True) -> int:
    """Run a program's work and return its exit code; print a user's mistake in one line instead of a traceback.

    explain_paths: files that are missing or not permitted are such a mistake, whatever opened them; a full disk is
    one line too, but not a mistake.
    """
    allocate_pinned_exactly(os.environ)  # the work imports torch
    try:
        return work() or 0
    except USER_ERRORS as error:
        say(f"{type(error).__name__}: {error}", file=sys.stderr)
    except ServerError as error:
        say(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if explain_paths and error.errno in FULL_ERRORS:
            where = f"{error.filename}: " if error.filename else ""
            say(f"OSError: {where}{error.strerror}. Free space, or write to another disk", file=sys.stderr)
            return 1
        if explain_paths and error.filename and error.errno in DISK_ERRORS:
            say(f"OSError: {error.filename}: {error.strerror}. Check the path, and its disk or server", file=sys.stderr)
            return 1
        explained = explained_path(error) if explain_paths or error.errno in WRONG_PATHS else None
        if explained is None:
            raise
        say(explained, file=sys.stderr)
    except UnicodeEncodeError as error:
        if error.reason != NO_UTF_8:
            raise
        name = error.object.encode("utf-8", "backslashreplace").decode()
        expected = "expected UTF-8. Rename the file or folder, or type the text in UTF-8"
        say(f"ConfigError: {name:.200}: found a text that is not UTF-8; {expected}", file=sys.stderr)
    except RuntimeError as error:
        if str(error) != NO_HOME:
            raise
        expected = "expected HOME, or a user of this machine after ~. Set HOME, or write the path in full"
        say(f"ConfigError: ~ in a path: found no home folder; {expected}", file=sys.stderr)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "cogvlm_ft":
            raise
        say(f"{error}; {ACTIVATE}", file=sys.stderr)
    return USER_ERROR_EXIT_CODE


def explained_path(error: OSError) -> str | None:
    """Return the line about a path that is missing, occupied or not permitted; None for other errors."""
    if not (error.filename and error.errno in PATH_ERRORS):
        return None
    return f"{type(error).__name__}: {error.filename}: {error.strerror}. Check the path and its permissions"


@contextlib.contextmanager
def fast_imports() -> Iterator[None]:
    """Import torch and what needs it without garbage collections, which takes a fifth less time.

    Later collections leave out what was imported: no rank pauses for it in training, where the others would wait, and
    the end of the program takes two seconds less.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def paste(program: str, *arguments: object) -> str:
    """Return a command line that runs a program of launch/ with this Python, in a checkout and installed alike."""
    return shlex.join([_from_here(sys.executable), "-m", f"cogvlm_ft.launch.{program}", *map(str, arguments)])


def paste_ranks(program: str, *arguments: object, num_gpus: int | None = None) -> str:
    """Return a command line that runs a program of launch/ on `num_gpus` GPUs of this node; None: on all."""
    options = [] if num_gpus is None else ["--num_accelerators", str(num_gpus)]
    return paste_tool("deepspeed", *options, "--module", f"cogvlm_ft.launch.{program}", *arguments)


def paste_tool(name: str, *arguments: object) -> str:
    """Return a command line that runs a program that is installed with this Python."""
    return shlex.join([_from_here(str(Path(sys.executable).with_name(name))), *map(str, arguments)])


def _from_here(executable: str) -> str:
    path = Path(executable)
    return str(path.relative_to(Path.cwd()) if Path.cwd() in path.parents[1:] else path)
