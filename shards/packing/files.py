"""Read a file named by annotations: a regular file inside the user's folder, of bounded size."""

from __future__ import annotations

import base64
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from io import FileIO
from pathlib import Path

from cogvlm_ft.shards.packing.candidates import Rejected

MAX_ANNOTATION_BYTES = 64 * 2**20
"""Limit for an annotation file of one image, with or without the image in it."""

_KINDS = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG", "png"),
    (b"RIFF", "webp"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)


def read_inside(
    folder: Path, name: str, what: str, max_bytes: int, *, num_first: int | None = None, num_last: int | None = None
) -> bytes:
    """Read a file; raises Rejected if it is missing, too large, not a regular file, or outside the folder.

    what: "image" or "annotation", for the reasons: missing_image, unreadable_image, path_outside_images.
    num_first, num_last: read the first or the last bytes only.
    """
    with open_inside(folder, name, what, max_bytes) as (file, num_bytes):
        if num_last is not None:
            file.seek(max(num_bytes - num_last, 0))
        return file.read(num_bytes if num_first is None else num_first) or b""


@contextmanager
def open_inside(folder: Path, name: str, what: str, max_bytes: int) -> Iterator[tuple[FileIO, int]]:
    """Open a file as `read_inside` does, and return it with its number of bytes; reading may raise Rejected too."""
    try:
        with open(_path_inside(folder, name), "rb", buffering=0, opener=_open_at_once) as file:
            # The file that was opened, not what the path may lead to later.
            if not _is_inside(os.readlink(f"/proc/self/fd/{file.fileno()}"), folder):  # noqa: PTH115
                raise PermissionError
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FileNotFoundError
            if status.st_size > max_bytes:
                detail = f"{name!r:.200} has {status.st_size} bytes; expected at most {max_bytes}"
                raise Rejected("sample", "too_large", detail)
            yield file, status.st_size
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _unreadable(folder, name, what, error) from None


def prefetch(folder: Path, name: str, *, num_first: int = 0) -> None:
    """Ask the disk to read a file ahead of `read_inside`. Errors are ignored; `read_inside` reports them.

    num_first: the first bytes only; 0: all.
    """
    with suppress(OSError, ValueError):
        file = _open_at_once(_path_inside(folder, name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(file, 0, num_first, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting: a pipe would wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def _is_inside(real_path: str, folder: Path) -> bool:
    return real_path.startswith(_real_folder(folder))


@lru_cache(maxsize=16)
def _real_folder(folder: Path) -> str:
    return os.path.join(os.path.realpath(folder), "")  # noqa: PTH118


def _path_inside(folder: Path, name: str) -> str:
    """Return the path; raises PermissionError if the name leads outside, so that such a file is not even opened."""
    path = os.path.join(folder, name)  # noqa: PTH118
    if (name.startswith("/") or ".." in name) and not _is_inside(os.path.realpath(path), folder):
        raise PermissionError
    return path


def _unreadable(folder: Path, name: str, what: str, error: Exception) -> Rejected:
    """Return the reason; a path outside the folder is reported as such whether it exists or not."""
    if isinstance(error, OSError) and not _is_inside(os.path.realpath(folder / name), folder):
        return Rejected("sample", f"path_outside_{what}s", f"{name!r:.200} leads out of {folder}.")
    if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
        advice = f"; expected the {what}. Pass its folder as --{what}s, or correct the path."
        return Rejected("sample", f"missing_{what}", f"no file {name!r:.200} in {folder}{advice}")
    return Rejected("sample", f"unreadable_{what}", f"{name!r:.200}: {error}")  # no permission, a loop of links


def read_ends(path: Path, num_bytes: int) -> bytes:
    """Read the first and last bytes, which identify a large JSON file; empty unless it is a regular file."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        head = file.read(num_bytes)
        file.seek(max(path.stat().st_size - num_bytes, len(head)))
        return head + b" " + file.read(num_bytes)


def read_embedded(annotation: Path) -> tuple[str, bytes]:
    """Return (extension, bytes) of the image in "imageData" of a labelme file. Raises Rejected if there is none."""
    content = read_inside(annotation.parent, annotation.name, "annotation", MAX_ANNOTATION_BYTES)
    try:
        data = base64.b64decode(json.loads(content)["imageData"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        detail = f"no image file, and none in {annotation.name}: {type(error).__name__}: {error}"
        raise Rejected("sample", "missing_image", detail) from None
    ext = next((ext for start, ext in _KINDS if data.startswith(start)), None)
    if ext is None:
        detail = f"the imageData of {annotation.name} is not an image: it begins with {data[:8]!r}"
        raise Rejected("sample", "broken_image", detail)
    return ext, data
