"""Files in object stores, s3:// and gs://, read by range through fsspec, which the extras `s3` and `gcs` install."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from cogvlm_ft.data.addresses import scheme_of, shown
from cogvlm_ft.data.versions import check_same
from cogvlm_ft.errors import DataError

STORES = {"s3": "s3", "gs": "gcs"}
"""Scheme -> the extra of setup.py that reads it."""

_CHECK_EVERY_S = 60.0
_FAILING_CODES = (408, 429, 500, 502, 503, 504)  # of gcsfs
_AWAY = {
    ("botocore", "HTTPClientError"),
    ("aiohttp", "ClientError"),
    ("google", "TransportError"),
    ("fsspec", "FSTimeoutError"),
    ("asyncio", "TimeoutError"),
}
"""Package and name of errors of the stores' libraries, which need not be installed."""

_checked_at: dict[str, float] = {}

T = TypeVar("T")


def reads_ranges(url: str) -> bool:
    """Return whether this is in an object store, and what reads it is installed."""
    return scheme_of(url) in STORES and _file_system(scheme_of(url), os.getpid()) is not None


def size_of(url: str) -> int:
    """Return the bytes of a file. Raises OSError if another attempt may help, else DataError."""
    info = _asked(url, lambda files: files.info(url))
    _checked_at[url] = time.monotonic()
    check_same(url, (str(info.get("ETag") or info.get("etag") or info.get("generation") or ""),))
    return int(info["size"])


def read_range(url: str, offset: int, num_bytes: int) -> bytes:
    """Return a part of a file. Raises OSError if another attempt may help, else DataError."""
    _check_same(url)
    data: bytes = _asked(url, lambda files: files.cat_file(url, start=offset, end=offset + num_bytes))
    if len(data) != num_bytes:
        raise OSError(f"{len(data)} of {num_bytes} bytes")
    return data


def _check_same(url: str) -> None:
    """Raise DataError if the file was replaced; it is asked about now and then, because this is another request."""
    if time.monotonic() - _checked_at.get(url, float("-inf")) > _CHECK_EVERY_S:
        size_of(url)


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
