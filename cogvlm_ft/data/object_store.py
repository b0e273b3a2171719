"""Files in object stores, s3:// and gs://, read by range through fsspec, which the extras `s3` and `gcs` install."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from cogvlm_ft.data.addresses import scheme_of, shown
from cogvlm_ft.errors import DataError

STORES = {"s3": "s3", "gs": "gcs"}
"""Scheme -> the extra of setup.py that reads it."""

T = TypeVar("T")


def reads_ranges(url: str) -> bool:
    """Return whether this is in an object store, and what reads it is installed."""
    return scheme_of(url) in STORES and _file_system(scheme_of(url), os.getpid()) is not None


def size_of(url: str) -> int:
    """Return the bytes of a file. Raises OSError if another attempt may help, else DataError."""
    return int(_asked(url, lambda files: files.info(url)["size"]))


def read_range(url: str, offset: int, num_bytes: int) -> bytes:
    """Return a part of a file. Raises OSError if another attempt may help, else DataError."""
    data: bytes = _asked(url, lambda files: files.cat_file(url, start=offset, end=offset + num_bytes))
    if len(data) != num_bytes:
        raise OSError(f"{len(data)} of {num_bytes} bytes")
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
        raise DataError(f"{shown(url)}: {type(error).__name__}: {shown(str(error))}") from None


@lru_cache(maxsize=8)
def _file_system(scheme: str, pid: int) -> Any:
    """Return fsspec's file system, or None if it is not installed; a forked process needs its own."""
    import fsspec  # here, because reading from a disk does not need it

    try:
        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError:
        return None
