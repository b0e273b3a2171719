"""Shards on a server: samples by HTTP range, or, if the server does not support ranges, whole shards in a local cache.

Whole files come through webdataset's opener, which starts curl, gsutil, ... with the URL as an argument, without a
shell; URLs that are commands ("pipe:") are refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import select
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from cogvlm_ft.errors import DataError

if TYPE_CHECKING:
    import requests

SCHEMES = ("http", "https", "gs", "s3", "hf", "ais")

_RETRY_DELAYS_S = (0.5, 2.0, 8.0)
_TIMEOUT_S = (10, 60)  # to connect; without receiving a byte
_DEADLINE_S = 600.0  # for one range
_MAX_JSON_BYTES = 1 << 30  # of an index or offsets file
_CHUNK = 1 << 20
_RETRIED_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_CURL_HTTP_ERROR = 22  # curl itself retries where that can help

T = TypeVar("T")


@dataclass(frozen=True)
class Cache:
    """Folder of whole shards, and its maximum size in bytes."""

    folder: Path
    max_bytes: int

    def check_room(self, num_bytes: int) -> None:
        """Raise DataError unless `num_bytes` more fit."""
        used = sum(path.stat().st_size for path in self.folder.glob("*.tar"))
        if used + num_bytes > self.max_bytes:
            raise DataError(
                f"data.cache_dir={self.folder}: found {used / 2**30:.2f} GiB of shards; expected room for "
                f"{num_bytes / 2**30:.2f} GiB more within data.cache_gib={self.max_bytes / 2**30:g}. Raise it, or "
                "delete files there"
            )


@dataclass(frozen=True)
class RemoteShard:
    """A tar on a server. cache: None if the server supports ranges."""

    url: str
    size: int
    sha256: str
    cache: Cache | None

    def __str__(self) -> str:
        return shown(self.url)

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.url.rpartition("/")[2]

    def read(self, size: int, offset: int) -> bytes:
        """Return `size` bytes of the tar from `offset`. Raises DataError if the server does not send them."""
        if self.cache is None:
            return _retried(self.url, lambda: _read_range(self.url, offset, size, self.size)) if size else b""
        path = self.cache.folder / f"{self.sha256}.tar"
        if not path.exists():
            self._download(path, self.cache)
        with path.open("rb") as file:
            return os.pread(file.fileno(), size, offset)

    def _download(self, path: Path, cache: Cache) -> None:
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # only one of the processes that need this shard downloads it
            if path.exists():
                return
            cache.check_room(self.size)
            unfinished = path.with_suffix(".tmp")
            try:
                digest = _retried(self.url, lambda: _save(self.url, unfinished, self.size))
                if digest != self.sha256:
                    raise DataError(
                        f"{self}: found sha256 {digest}; expected {self.sha256}, as in index.json. "
                        "Upload the whole build again"
                    )
                unfinished.replace(path)
            finally:
                unfinished.unlink(missing_ok=True)


def is_url(path: str) -> bool:
    """Return True for a URL or command, False for a local path."""
    return "://" in path or path.startswith("pipe:")


def check_url(url: str) -> None:
    """Raise DataError unless this is the URL of a folder that may be opened."""
    scheme = urlsplit(url).scheme
    if scheme not in SCHEMES:
        expected = ", ".join(f"{name}://" for name in SCHEMES)
        raise DataError(f"{shown(url)}: found scheme {scheme!r}; expected a local folder or one of {expected}")
    if re.search(r"[\s?#\[\]{}*\\]", url):
        raise DataError(f"{shown(url)}: expected the URL of a folder, without blanks and ? # [ ] {{ }} * \\")


def shown(url: str) -> str:
    """Return the URL without its user name and password."""
    return re.sub(r"//[^/@]*@", "//", url)


def fetch_json(url: str) -> Any:
    """Download a small JSON file and return its content. Raises DataError."""
    data = _retried(url, lambda: b"".join(_stream(url, _MAX_JSON_BYTES)))
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown(url)}: {error}; expected valid JSON. Upload the whole build again") from None


def gives_ranges(url: str, size: int) -> bool:
    """Return whether the server supports ranges for this tar. Raises DataError if it cannot be read at all."""
    if not url.startswith(("http://", "https://")):
        return False
    try:
        return bool(_retried(url, lambda: _read_range(url, 0, 1, size)))
    except _WholeFile:
        return False


class _WholeFile(DataError):
    """The server answers a request for a range with the whole file."""


def _retried(url: str, action: Callable[[], T]) -> T:
    for delay_s in (*_RETRY_DELAYS_S, None):
        try:
            return action()
        except OSError as error:  # also every error of requests
            if delay_s is None:
                num_attempts = len(_RETRY_DELAYS_S) + 1
                raise DataError(f"{shown(url)}: {shown(str(error))}; gave up after {num_attempts} attempts") from None
            time.sleep(delay_s)
    raise AssertionError


def _read_range(url: str, offset: int, size: int, total: int) -> bytes:
    """Download a byte range. Raises OSError if a retry may help, else DataError."""
    last = offset + size - 1
    headers = {"Range": f"bytes={offset}-{last}", "Accept-Encoding": "identity"}
    end_s = time.monotonic() + _DEADLINE_S
    with _session(os.getpid()).get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as response:
        status = response.status_code
        if status in _RETRIED_STATUSES:
            raise OSError(f"HTTP {status}")
        if status == 200:
            raise _WholeFile(f"{shown(url)}: the server no longer supports ranges")
        found, expected = response.headers.get("Content-Range", ""), f"bytes {offset}-{last}/{total}"
        if status != 206 or found not in (expected, f"bytes {offset}-{last}/*"):
            raise DataError(
                f"{shown(url)}: found HTTP {status} {found!r}; expected 206 {expected!r}. Check that the tar and its "
                "index.json are from the same build"
            )
        data = b""
        for chunk in response.iter_content(_CHUNK):
            data += chunk
            if len(data) > size or time.monotonic() > end_s:
                break
    if len(data) != size:
        raise OSError(f"{len(data)} of {size} bytes")
    return data


@lru_cache(maxsize=1)
def _session(pid: int) -> requests.Session:
    """Return a session whose connections are reused; a forked process needs its own."""
    import requests  # here, because reading from a disk does not need it

    return requests.Session()


def _save(url: str, path: Path, size: int) -> str:
    """Download a file of `size` bytes to `path` and return its sha256."""
    sha256 = hashlib.sha256()
    num_bytes = 0
    with path.open("wb") as file:
        for chunk in _stream(url, size):
            file.write(chunk)
            sha256.update(chunk)
            num_bytes += len(chunk)
    if num_bytes != size:
        raise OSError(f"{num_bytes} of {size} bytes")
    return sha256.hexdigest()


def _stream(url: str, max_bytes: int) -> Iterator[bytes]:
    """Download a whole file in chunks. Raises OSError if a retry may help, else DataError."""
    from webdataset.gopen import gopen, gopen_schemes  # here, because webdataset imports torch if there is one

    scheme = urlsplit(url).scheme
    if scheme not in gopen_schemes:  # s3
        raise DataError(
            f"{shown(url)}: no opener for {scheme}://. Set USE_AIS_FOR={scheme} to read it with ais, or use https://"
        )
    try:
        pipe = gopen(url)
    except (FileNotFoundError, ImportError) as error:
        raise DataError(f"{shown(url)}: {error}; the program that opens {scheme}:// is missing. Install it") from None
    try:
        num_bytes = 0
        while chunk := _next_chunk(pipe.stream.fileno()):
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise DataError(f"{shown(url)}: found more than {max_bytes} bytes; expected at most that many")
            yield chunk
        status = pipe.proc.wait(_TIMEOUT_S[1])
    finally:
        pipe.proc.kill()
        pipe.ignore_errors = True  # closing must not raise; errors are reported below
        pipe.close()
    if status == _CURL_HTTP_ERROR and scheme.startswith("http"):
        raise DataError(f"{shown(url)}: the server refuses it (not there, or no permission)")
    if status:
        raise OSError(f"the program that reads {scheme}:// exited with status {status}")


def _next_chunk(pipe: int) -> bytes:
    if not select.select([pipe], [], [], _TIMEOUT_S[1])[0]:
        raise OSError(f"no data for {_TIMEOUT_S[1]} s")
    return os.read(pipe, _CHUNK)
