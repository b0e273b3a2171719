"""Reads a file that annotations name: a plain file inside the folder the user gave, of bounded size."""

from __future__ import annotations

import base64
import json
import os
import stat
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from cogvlm_ft.shards.packing.candidates import Rejected

MAX_ANNOTATION_BYTES = 64 * 2**20
"""Of a file about one image, also with the image in it."""

_KINDS = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG", "png"),
    (b"RIFF", "webp"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)


def read_inside(folder: Path, name: str, what: str, max_bytes: int) -> bytes:
    """Raises Rejected if it is missing, too large, no plain file, or outside the folder, also by a link.

    what: "image" or "annotation", for the reasons: missing_image, unreadable_image, path_outside_images.
    """
    try:
        with open(_path_inside(folder, name), "rb", buffering=0, opener=_open_at_once) as file:
            # Where the kernel went, and not where a path would lead at another moment.
            if not _is_inside(os.readlink(f"/proc/self/fd/{file.fileno()}"), folder):  # noqa: PTH115
                raise PermissionError
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FileNotFoundError
            if status.st_size > max_bytes:
                detail = f"{name!r:.200} has {status.st_size} bytes, the limit is {max_bytes}"
                raise Rejected("sample", "too_large", detail)
            return file.read(status.st_size)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _unreadable(folder, name, what, error) from None


def prefetch(folder: Path, name: str) -> None:
    """Ask the disk to read a file ahead of `read_inside`. Errors are ignored; `read_inside` reports them."""
    with suppress(OSError, ValueError):
        file = _open_at_once(_path_inside(folder, name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)


def _open_at_once(path: str, flags: int) -> int:
    """A pipe is opened without waiting for somebody to write to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _is_inside(real_path: str, folder: Path) -> bool:
    return real_path.startswith(_real_folder(folder))


@lru_cache(maxsize=16)
def _real_folder(folder: Path) -> str:
    return os.path.join(os.path.realpath(folder), "")  # noqa: PTH118


def _path_inside(folder: Path, name: str) -> str:
    """Raises PermissionError if the words of the name lead outside: such a file is not even opened."""
    path = os.path.join(folder, name)  # noqa: PTH118
    if (name.startswith("/") or ".." in name) and not _is_inside(os.path.realpath(path), folder):
        raise PermissionError
    return path


def _unreadable(folder: Path, name: str, what: str, error: Exception) -> Rejected:
    """What is outside is called so, whether it exists or not."""
    if isinstance(error, OSError) and not _is_inside(os.path.realpath(folder / name), folder):
        return Rejected("sample", f"path_outside_{what}s", f"{name!r:.200} leads out of {folder}")
    if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
        return Rejected("sample", f"missing_{what}", f"no file {name!r:.200} in {folder}")
    return Rejected("sample", f"unreadable_{what}", f"{name!r:.200}: {error}")  # no permission, a circle of links


def read_ends(path: Path, num_bytes: int) -> bytes:
    """The first and the last bytes, which tell what a large JSON file is; nothing if it is no plain file."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        head = file.read(num_bytes)
        file.seek(max(path.stat().st_size - num_bytes, len(head)))
        return head + b" " + file.read(num_bytes)


def read_embedded(annotation: Path) -> tuple[str, bytes]:
    """(extension, bytes) of the image in the "imageData" of a labelme file. Raises Rejected if there is none."""
    content = read_inside(annotation.parent, annotation.name, "annotation", MAX_ANNOTATION_BYTES)
    try:
        data = base64.b64decode(json.loads(content)["imageData"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        detail = f"no image file, and none in {annotation.name}: {type(error).__name__}: {error}"
        raise Rejected("sample", "missing_image", detail) from None
    ext = next((ext for start, ext in _KINDS if data.startswith(start)), None)
    if ext is None:
        detail = f"the imageData of {annotation.name} is no image: it begins with {data[:8]!r}"
        raise Rejected("sample", "broken_image", detail)
    return ext, data
