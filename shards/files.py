"""Reads a file that annotations name: a plain file inside the folder the user gave, of bounded size."""

from __future__ import annotations

import base64
import json
import os
import stat
from pathlib import Path

from shards.candidates import Rejected

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
        root, path = os.path.realpath(folder), os.path.realpath(folder / name)
        if os.path.commonpath([root, path]) != root:
            raise Rejected("sample", f"path_outside_{what}s", f"{name!r:.200} leads out of {folder}")
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would never end
            raise FileNotFoundError
        if status.st_size > max_bytes:
            detail = f"{name!r:.200} has {status.st_size} bytes, the limit is {max_bytes}"
            raise Rejected("sample", "too_large", detail)
        with Path(path).open("rb") as file:
            return file.read(max_bytes)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise Rejected("sample", f"missing_{what}", f"no file {name!r:.200} in {folder}") from None
    except (OSError, ValueError) as error:  # no permission, a circle of links; ValueError: a NUL in the name
        raise Rejected("sample", f"unreadable_{what}", f"{name!r:.200}: {error}") from None


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
