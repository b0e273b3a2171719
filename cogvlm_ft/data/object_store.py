"""Files in object stores, s3:// and gs://, read by range through fsspec, which the extras `s3` and `gcs` install."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from cogvlm_ft.data.addresses import scheme_of, shown
from cogvlm_ft.data.versions import check_same
from cogvlm_ft.errors import DataError

STORES = {"s3": "s3", "gs": "gcs"}
"""Scheme -> the extra of setup.py that reads it."""

_MAX_OPEN_FILES = 256
_FAILING_CODES = (408, 429, 500, 502, 503, 504)  # of gcsfs
_AWAY = {
    ("botocore", "HTTPClientError"),
    ("aiohttp", "ClientError"),
    ("google", "TransportError"),
    ("fsspec", "FSTimeoutError"),
    ("asyncio", "TimeoutError"),
}
"""Errors of the stores' libraries, by package and name because the libraries may not be installed."""

_generations: dict[str, str] = {}  # of files in gs://, as they were read first

T = TypeVar("T")


def reads_ranges(url: str) -> bool:
    """Return whether this is in an object store, and what reads it is installed."""
    return scheme_of(url) in STORES and _file_system(scheme_of(url), os.getpid()) is not None


def size_of(url: str) -> int:
    """Return the bytes of a file. Raises OSError if another attempt may help, else DataError."""
    return _checked(url, _asked(url, lambda files: files.info(url)))


def read_range(url: str, offset: int, num_bytes: int, total: int) -> bytes:
    """Return a part of a file of `total` bytes. Raises OSError if another attempt may help, else DataError.

    The store is asked for the content that was read first: a replaced file is noticed by the read itself.
    """
    read = _read_same_s3 if scheme_of(url) == "s3" else _read_same_gs
    data = read(url, offset, num_bytes, total)
    if len(data) != num_bytes:
        raise OSError(f"{len(data)} of {num_bytes} bytes")
    return data


def _checked(url: str, info: dict[str, Any], total: int | None = None) -> int:
    """Return the bytes of a file by what the store states. Raises DataError if it was replaced, or has other bytes."""
    check_same(url, (str(info.get("ETag") or info.get("etag") or info.get("generation") or ""),))
    size = int(info["size"])
    if total is not None and size != total:
        raise DataError(
            f"{shown(url)}: found {size} bytes; expected {total}. Check that the tar and its index.json are from the "
            "same build"
        )
    return size


def _read_same_s3(url: str, offset: int, num_bytes: int, total: int) -> bytes:
    """Read from an opened file: s3fs asks for its content by ETag (`If-Match`)."""
    try:
        file = _opened(url, total, os.getpid(), threading.get_ident())
        file.seek(offset)
        data: bytes = _asked(url, lambda _: file.read(num_bytes))
    except OSError as error:
        _opened.cache_clear()
        if type(error).__name__ == "FileExpired":
            size_of(url)
        raise
    return data


@lru_cache(maxsize=_MAX_OPEN_FILES)
def _opened(url: str, total: int, _pid: int, _thread: int) -> Any:
    """Return an opened file, which forked processes and threads do not share."""
    file = _asked(url, lambda files: files.open(url, "rb", cache_type="none"))
    _checked(url, file.details, total)
    return file


def _read_same_gs(url: str, offset: int, num_bytes: int, total: int) -> bytes:
    """Read the generation that was read first; one that is gone was replaced."""
    if url not in _generations:
        info = _asked(url, lambda files: files.info(url))
        _checked(url, info, total)
        _generations[url] = str(info.get("generation") or "")
    same = {"generation": _generations[url]} if _generations[url] else {}
    try:
        data: bytes = _asked(url, lambda files: files.cat_file(url, start=offset, end=offset + num_bytes, **same))
    except DataError:
        size_of(url)
        raise
    return data


def exists(url: str) -> bool:
    """Return whether there is such a file."""
    return bool(_asked(url, lambda files: files.exists(url)))


def matching(pattern: str) -> list[str]:
    """Return the addresses that match a pattern, in alphabetical order."""
    scheme = scheme_of(pattern)
    if not reads_ranges(pattern):
        raise DataError(
            f"{shown(pattern)}: patterns of {scheme}:// need more packages. Install them: "
            f"pip install 'cogvlm-ft[{STORES[scheme]}]'"
        )
    return [f"{scheme}://{path}" for path in sorted(_asked(pattern, lambda files: files.glob(pattern)))]


def _asked(url: str, question: Callable[[Any], T]) -> T:
    try:
        return question(_file_system(scheme_of(url), os.getpid()))
    except (FileNotFoundError, PermissionError) as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else "no permission"
        raise DataError(
            f"{shown(url)}: {found}; expected a file that this account may read. {shown(str(error))}"
        ) from None
    except OSError:
        raise
    except Exception as error:  # of the store's own library, such as a missing login
        if _is_away(error):
            raise OSError(f"{type(error).__name__}: {error}") from None
        raise DataError(f"{shown(url)}: {type(error).__name__}: {shown(str(error))}") from None


def _is_away(error: Exception) -> bool:
    """Return whether a store's library could not reach its server, or that fails."""
    kinds = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}
    return bool(kinds & _AWAY) or getattr(error, "code", None) in _FAILING_CODES


@lru_cache(maxsize=8)
def _file_system(scheme: str, pid: int) -> Any:
    """Return fsspec's file system, or None if it is not installed; a forked process needs its own."""
    import fsspec  # here, because reading from a disk does not need it

    try:
        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError:
        return None
