"""Tars that cannot be read in place: whole files come through webdataset's opener into a local cache.

Those are files on servers without ranges, compressed tars, and what a command (`pipe:`) writes.
"""

from __future__ import annotations

import bz2
import fcntl
import gzip
import hashlib
import io
import lzma
import os
import select
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cogvlm_ft.data.addresses import is_command, is_url, name_of, scheme_of, shown
from cogvlm_ft.data.object_store import STORES
from cogvlm_ft.data.opener import ABSENT, NO_OPENER, NO_PROGRAM, OFFLINE
from cogvlm_ft.data.patience import retried
from cogvlm_ft.errors import DataError
from cogvlm_ft.plain_files import open_new
from cogvlm_ft.runtime.watchdog import progress

_LOCK_TICK_S = 0.1
_SILENCE_S = 60  # without receiving a byte
_CHUNK = 1 << 20
FAILING_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_CURL_HTTP_ERROR = 22  # curl itself retries where that can help
_PACKAGE_PARENT = Path(__file__).resolve().parents[2]
_START_OPENER = "import sys; sys.path.append(sys.argv[1]); from cogvlm_ft.data.opener import run; run()"
_OPENERS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}
_ZSTD = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True)
class Cache:
    """Folder of whole shards, and its maximum size in bytes."""

    folder: Path
    max_bytes: int

    def room(self) -> int:
        """Return how many bytes more fit."""
        return self.max_bytes - sum(path.stat().st_size for path in self.folder.glob("*.tar"))

    def check_room(self, num_bytes: int) -> None:
        """Raise DataError unless `num_bytes` more fit."""
        if num_bytes > self.room():
            used = self.max_bytes - self.room()
            raise DataError(
                f"data.cache_dir={self.folder}: found {used / 2**30:.2f} GiB of shards; expected room for "
                f"{num_bytes / 2**30:.2f} GiB more within data.cache_gib={self.max_bytes / 2**30:g}. Raise it, or "
                "delete files there"
            )


def cached_shard(url: str, num_bytes: int, sha256: str, cache: Cache) -> Path:
    """Return the local copy of a shard of known content."""
    path = cache.folder / f"{sha256}.tar"
    with _one_at_a_time(path) as is_missing:
        if is_missing:
            cache.check_room(num_bytes)
            digest = retried(url, lambda: _save(stream(url, num_bytes), _unfinished(path), num_bytes))
            if digest != sha256:
                raise DataError(
                    f"{shown(url)}: found sha256 {digest}; expected {sha256}, as in index.json. "
                    "Upload the whole build again"
                )
            _unfinished(path).replace(path)
    return path


def cached_tar(location: str, cache: Cache | None, why: str) -> Path:
    """Return the local, decompressed copy of a tar. why: the reason why it cannot be read in place, for the error.

    A copy made earlier is used again, whatever the server has now; that of a local file only if the file is the same.
    """
    if cache is None:
        raise DataError(f"{shown(location)}: {why}. Set data.cache_dir to a local folder with room for it")
    cache.folder.mkdir(parents=True, exist_ok=True)
    identity = shown(location) if is_url(location) else location  # a query may be another signature every day
    if not is_url(location) and not is_command(location):
        status = Path(location).stat()
        identity += f" {status.st_size} {status.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    path = cache.folder / f"{name_of(location).partition('.')[0]}-{digest}.tar"
    with _one_at_a_time(path) as is_missing:
        if is_missing:
            retried(location, lambda: _unpack(location, _unfinished(path), cache))
            _unfinished(path).replace(path)
    return path


def starts_compressed(path: Path) -> bool:
    """Return whether a local file begins as compressed data does."""
    with path.open("rb") as file:
        start = file.read(6)
    return start.startswith((*_OPENERS, _ZSTD))


def stream(location: str, max_bytes: int) -> Iterator[bytes]:
    """Open a whole file with webdataset and yield it in chunks. Raises OSError if a retry may help, else DataError."""
    command = [sys.executable, "-c", _START_OPENER, str(_PACKAGE_PARENT)]
    opener = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert opener.stdin is not None and opener.stdout is not None
    status = 0
    try:
        opener.stdin.write(location.encode("utf-8", "surrogateescape") + b"\n")
        opener.stdin.flush()
        num_bytes = 0
        while chunk := _next_chunk(opener.stdout):
            progress()
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise DataError(f"{shown(location)}: found more than {max_bytes} bytes; expected at most that many")
            yield chunk
        status = _exit_status(opener)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(opener.pid, signal.SIGKILL)  # and whatever the opener has started
        opener.wait()
        opener.stdout.close()
        with suppress(BrokenPipeError):
            opener.stdin.close()
    if status:
        _raise_failure(location, status)


def _next_chunk(pipe: IO[bytes]) -> bytes:
    if not select.select([pipe], [], [], _SILENCE_S)[0]:
        raise OSError(f"no data for {_SILENCE_S} s")
    return os.read(pipe.fileno(), _CHUNK)


def _exit_status(opener: subprocess.Popen[bytes]) -> int:
    """Wait for the end of the opener, but leave it as a zombie: its number then still names its group alone."""
    end_s = time.monotonic() + _SILENCE_S
    while (ended := os.waitid(os.P_PID, opener.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)) is None:
        if time.monotonic() > end_s:
            raise OSError(f"the opener did not end within {_SILENCE_S} s")
        time.sleep(0.01)
    return ended.si_status


def _raise_failure(location: str, status: int) -> None:
    scheme = "" if is_command(location) else scheme_of(location)
    if status == NO_OPENER and scheme:
        extra = f"pip install 'cogvlm-ft[{STORES[scheme]}]', or set" if scheme in STORES else "Set"
        raise DataError(
            f"{shown(location)}: no opener for {scheme}://; expected one. {extra} USE_AIS_FOR={scheme} to read it "
            "with ais, or use https://"
        )
    if status == OFFLINE:
        raise DataError(
            f"{shown(location)}: the hub cannot be reached from here; expected a connection to huggingface.co. "
            "Download the data set where there is one (hf download --repo-type dataset): it is then read from the "
            "cache of huggingface_hub (HF_HUB_CACHE)"
        )
    if status == ABSENT and scheme == "hf":
        raise DataError(
            f"{shown(location)}: the hub has no such file, or not for this account; expected one. Check the address, "
            "or log in with `hf auth login`"
        )
    if status == NO_PROGRAM:
        what = f"opens {scheme}://" if scheme else "the command names"
        raise DataError(f"{shown(location)}: the program that {what} is missing. Install it")
    if status == _CURL_HTTP_ERROR and scheme.startswith("http") and not _is_failing(location):
        raise DataError(f"{shown(location)}: the server refuses it (not there, or no permission)")
    if is_command(location):
        raise DataError(f"{shown(location)}: the command exited with status {status}; expected 0. Try it in a shell")
    raise OSError(f"the program that reads {scheme}:// exited with status {status}")


def _is_failing(url: str) -> bool:
    """Return whether the server itself fails, which curl does not tell apart from a file that is not there."""
    import requests  # here, because reading from a disk does not need it

    with requests.get(url, stream=True, timeout=_SILENCE_S) as response:
        return response.status_code in FAILING_STATUSES


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[bool]:
    """Yield whether the file is missing; only one of the processes that need it is let in while it is."""
    if path.exists():
        yield False
        return
    with path.with_suffix(".lock").open("w") as lock:
        num_bytes = 0
        while not _is_locked(lock):
            with suppress(FileNotFoundError):
                if _unfinished(path).stat().st_size != num_bytes:
                    num_bytes = _unfinished(path).stat().st_size
                    progress()  # of the process that fetches it
            time.sleep(_LOCK_TICK_S)
        try:
            yield not path.exists()
        finally:
            _unfinished(path).unlink(missing_ok=True)


def _is_locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unfinished(path: Path) -> Path:
    return path.with_suffix(".tmp")


def _save(chunks: Iterator[bytes], path: Path, num_bytes: int) -> str:
    """Write a file of `num_bytes` bytes and return its sha256."""
    sha256 = hashlib.sha256()
    written = 0
    with open_new(path) as file:
        for chunk in chunks:
            file.write(chunk)
            sha256.update(chunk)
            written += len(chunk)
    if written != num_bytes:
        raise OSError(f"{written} of {num_bytes} bytes")
    return sha256.hexdigest()


def _unpack(location: str, path: Path, cache: Cache) -> None:
    """Write the content of a tar, decompressed, up to the size that the cache has left."""
    room = cache.room()
    written = 0
    chunks = stream(location, room)
    try:
        with open_new(path) as file:
            plain = _decompressed(io.BufferedReader(_Chunks(chunks), _CHUNK), location)
            while data := plain.read(_CHUNK):
                written += len(data)
                if written > room:
                    cache.check_room(written)
                file.write(data)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(
            f"{shown(location)}: the compressed data is damaged or ends early: {error}. Copy the tar again"
        ) from None
    finally:
        chunks.close()  # type: ignore[attr-defined]  # a generator: this ends the opener


def _decompressed(file: io.BufferedReader, location: str) -> Any:
    """Return a file that is read for the plain data."""
    start = file.peek(6)[:6]
    if start.startswith(_ZSTD):
        raise DataError(f"{shown(location)}: found zstd compression; expected gzip, bzip2, xz or none. Decompress it")
    for magic, opened in _OPENERS.items():
        if start.startswith(magic):
            return opened(file)
    return file


class _Chunks(io.RawIOBase):
    """Chunks as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._left = self._left or next(self._chunks, b"")
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count
