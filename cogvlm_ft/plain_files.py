"""Files from others are read with bounds, and files of ours are written where no link leads elsewhere."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

MAX_JSON_BYTES = 2**30
NOT_SYNCABLE = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of fsync for folders on CIFS and some FUSE file systems."""


def real_path(path: Path) -> Path:
    """Return the absolute path without links; of a loop of links, what leads to it."""
    return Path(os.path.realpath(path))  # not Path.resolve(): before Python 3.13, a loop is a RuntimeError there


def open_regular(path: str | Path, *, follow: bool = True) -> io.BufferedReader:
    """Open a regular file for reading. Raises OSError, also for a named pipe, which would block.

    follow: also where the path is a link; else that is an error.
    """

    def opener(name: str, flags: int) -> int:
        descriptor = os.open(name, flags | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
        try:
            _check_regular(descriptor, name)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    return io.open(path, "rb", opener=opener)  # noqa: UP020  as pathlib opens files


def _check_regular(descriptor: int, name: str) -> None:
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, "found a folder; expected a file", name)
    if not stat.S_ISREG(kind):
        found = "named pipe" if stat.S_ISFIFO(kind) else "device or socket"
        raise OSError(errno.EINVAL, f"found a {found}; expected a regular file", name)


def read_bytes(path: str | Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Return the content of a regular file of at most `max_bytes`. Raises OSError."""
    with open_regular(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > max_bytes:
            raise OSError(errno.EINVAL, f"found {num_bytes} bytes; expected at most {max_bytes}", str(path))
        with _naming(path):
            return file.read(num_bytes)  # not more: a buffer of that size would be allocated


def read_file(path: str | Path) -> bytes:
    """Return the content of a regular file of any size, for a user's own files. Raises OSError."""
    with open_regular(path) as file, _naming(path):
        return file.read()


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Add the file to an error of the disk while it is read."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def read_json(path: str | Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Return the content of a JSON file. Raises OSError or ValueError."""
    return parse_json(read_bytes(path, max_bytes))


def parse_json(text: str | bytes) -> Any:
    """Return the value that JSON describes. Raises ValueError, also for one that is nested too deeply."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise ValueError("found JSON that is nested too deeply; expected a few levels") from None


def json_lines(path: str | Path) -> Iterator[Any]:
    """Yield the values of a file with one JSON value per line. Raises OSError or ValueError."""
    with open_regular(path) as lines:
        for line in lines:
            yield parse_json(line)


@contextmanager
def replaced_file(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a new file that takes the place of `path` when the block ends without an error.

    Its name is `.tmp-NAME`. One that a killed process left is removed first. A link of that name is never followed.
    """
    partial = path.with_name(f".tmp-{path.name}")
    with open_new(partial, mode) as file:
        try:
            yield file
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    partial.replace(path)


def open_new(path: Path, mode: str = "wb", buffering: int = -1) -> IO[Any]:
    """Open a file that did not exist before, in place of one or of a link that did."""
    path.unlink(missing_ok=True)
    text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}  # of names that are not UTF-8
    return open(path, mode, buffering=buffering, opener=_create, **text)  # type: ignore[call-overload,no-any-return]


def _create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def copy_regular(source: Path, target: Path, *, follow: bool = True) -> None:
    """Copy the content of a regular file, as `open_regular` opens it. Raises OSError."""
    with open_regular(source, follow=follow) as file, open_new(target) as copy:
        shutil.copyfileobj(file, copy, 2**20)


def write_text(path: Path, text: str) -> None:
    """Write a text to a temporary file and rename it: readers see the former content or the new."""
    with replaced_file(path, "w") as file:
        file.write(text)


def sync(path: Path) -> bool:
    """Return when the file, or the names in the folder, are on disk; False if the file system cannot do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return sync_open(descriptor)
    finally:
        os.close(descriptor)


def sync_open(descriptor: int) -> bool:
    """Sync what is open; return whether the file system can do that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SYNCABLE:
            raise
        return False
    return True


def sync_tree(folder: Path) -> None:
    """Sync everything below the folder, and the folder itself."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
