"""Shards on a server: samples by range over HTTP or from an object store, else whole shards in a local cache."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cogvlm_ft.data import object_store
from cogvlm_ft.data.addresses import name_of, shown
from cogvlm_ft.data.patience import retried
from cogvlm_ft.data.versions import check_same
from cogvlm_ft.data.whole_files import FAILING_STATUSES, Cache, cached_shard, stream
from cogvlm_ft.errors import DataError
from cogvlm_ft.runtime.watchdog import progress

if TYPE_CHECKING:
    import requests

_TIMEOUT_S = (10, 60)  # to connect; without receiving a byte
_PART_BYTES, _PART_S = 1 << 16, 60.0  # a slower server counts as one that does not answer
_MAX_JSON_BYTES = 1 << 30  # of an index or offsets file
_CHUNK = 1 << 20
_READ_AHEAD = 1 << 15  # bytes; holds a small record and the headers around it
_ABSENT_STATUSES = (401, 403, 404, 410)


@dataclass(frozen=True)
class RemoteShard:
    """A tar on a server. cache: None if the server supports ranges. sha256: empty if unknown; then cache is None."""

    url: str
    size: int
    sha256: str
    cache: Cache | None

    def __str__(self) -> str:
        return shown(self.url)

    @property
    def name(self) -> str:
        """Name of the file."""
        return name_of(self.url)

    def read(self, size: int, offset: int) -> bytes:
        """Return `size` bytes of the tar from `offset`. Raises DataError if the server does not send them."""
        if self.cache is None:
            return read_range(self.url, offset, size, self.size) if size else b""
        with cached_shard(self.url, self.size, self.sha256, self.cache).open("rb") as file:
            return os.pread(file.fileno(), size, offset)


class RangeFile(io.RawIOBase):
    """A tar on a server as a file that is read forward and in small pieces, as a scan of its headers does."""

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size = url, size
        self._position = 0
        self._start, self._data = 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        size = left if size < 0 else min(size, left)
        if not self._start <= self._position <= self._position + size <= self._start + len(self._data):
            num_bytes = min(max(size, _READ_AHEAD), left)
            self._start = self._position
            self._data = read_range(self._url, self._start, num_bytes, self._size) if num_bytes else b""
        begin = self._position - self._start
        self._position += size
        return self._data[begin : begin + size]


def read_range(url: str, offset: int, size: int, total: int) -> bytes:
    """Return a part of a file of `total` bytes. Raises DataError."""
    if object_store.reads_ranges(url):
        return retried(url, lambda: object_store.read_range(url, offset, size, total))
    return retried(url, lambda: _http_range(url, offset, size, total))


def size_by_range(url: str) -> int | None:
    """Return the bytes of a file, or None if it cannot be read by range. Raises DataError if not at all."""
    if object_store.reads_ranges(url):
        return retried(url, lambda: object_store.size_of(url))
    if not url.startswith(("http://", "https://")):
        return None
    return retried(url, lambda: _http_size(url))


def fetch_json(url: str) -> Any:
    """Download a small JSON file and return its content. Raises DataError."""
    data = retried(url, lambda: _read_all(url))
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown(url)}: {error}; expected valid JSON. Upload the whole build again") from None


def _read_all(url: str) -> bytes:
    if object_store.reads_ranges(url):
        size = object_store.size_of(url)
        _check_small(url, size)
        return object_store.read_range(url, 0, size, size)
    if url.startswith(("http://", "https://")):
        return b"".join(_http_chunks(url))
    return b"".join(stream(url, _MAX_JSON_BYTES))


def _check_small(url: str, size: int) -> None:
    if size > _MAX_JSON_BYTES:
        raise DataError(f"{shown(url)}: found more than {_MAX_JSON_BYTES} bytes; expected at most that many")


def _http_chunks(url: str) -> Iterator[bytes]:
    num_bytes = 0
    with _session(os.getpid()).get(url, stream=True, timeout=_TIMEOUT_S) as response:
        _check_status(url, response.status_code, (200,))
        for chunk in _parts(response):
            num_bytes += len(chunk)
            _check_small(url, num_bytes)
            yield chunk


def _check_status(url: str, status: int, expected: tuple[int, ...]) -> None:
    if status in expected:
        return
    if status in FAILING_STATUSES:
        raise OSError(f"HTTP {status}")
    found = "the server refuses it (not there, or no permission)" if status in _ABSENT_STATUSES else "the server fails"
    raise DataError(f"{shown(url)}: HTTP {status}: {found}. Check the address")


def _http_size(url: str) -> int | None:
    headers = {"Range": "bytes=0-0", "Accept-Encoding": "identity"}
    with _session(os.getpid()).get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as response:
        _check_status(url, response.status_code, (200, 206))
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        if response.status_code != 206 or not total.isdecimal():
            return None
        _check_same(url, response)
        return int(total)


def _http_range(url: str, offset: int, size: int, total: int) -> bytes:
    """Download a byte range. Raises OSError if a retry may help, else DataError."""
    last = offset + size - 1
    headers = {"Range": f"bytes={offset}-{last}", "Accept-Encoding": "identity"}
    with _session(os.getpid()).get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as response:
        status = response.status_code
        if status in FAILING_STATUSES:
            raise OSError(f"HTTP {status}")
        if status == 200:
            raise DataError(f"{shown(url)}: the server no longer supports ranges")
        found, expected = response.headers.get("Content-Range", ""), f"bytes {offset}-{last}/{total}"
        if status != 206 or found not in (expected, f"bytes {offset}-{last}/*"):
            raise DataError(
                f"{shown(url)}: found HTTP {status} {found!r}; expected 206 {expected!r}. Check that the tar and its "
                "index.json are from the same build"
            )
        _check_same(url, response)
        data = bytearray()
        for part in _parts(response):
            data += part
            if len(data) > size:
                break
    if len(data) != size:
        raise OSError(f"{len(data)} of {size} bytes")
    return bytes(data)


def _parts(response: requests.Response) -> Iterator[bytes]:
    """Yield the body as it arrives. Raises OSError if the next `_PART_BYTES` take longer than `_PART_S`."""
    from urllib3.exceptions import HTTPError

    num_bytes, end_s = 0, time.monotonic() + _PART_S
    while True:
        try:
            part = response.raw.read1(_PART_BYTES, decode_content=True)
        except HTTPError as error:
            raise OSError(str(error)) from None
        if not part:
            return
        progress()
        yield part
        num_bytes += len(part)
        if num_bytes >= _PART_BYTES:
            num_bytes, end_s = 0, time.monotonic() + _PART_S
        elif time.monotonic() > end_s:
            raise OSError(f"received only {num_bytes} bytes in {_PART_S:g} s")


def _check_same(url: str, response: requests.Response) -> None:
    """Raise DataError if the file was replaced."""
    check_same(url, (response.headers.get("ETag", "").removeprefix("W/"), response.headers.get("Last-Modified", "")))


@lru_cache(maxsize=1)
def _session(pid: int) -> requests.Session:
    """Return a session whose connections are reused; a forked process needs its own."""
    import requests  # here, because reading from a disk does not need it

    return requests.Session()
