"""Safetensors files read and written in parts: at most one tensor in memory, hashed while writing.

The library's own functions take all tensors of a file at once and map files into memory. These are for files larger
than memory, and for files that must be on disk when the call returns. Format:
https://huggingface.co/docs/safetensors (8 bytes length, JSON header, data).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.plain_files import open_new, open_regular, parse_json, sync_open

DTYPE_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
ITEM_BYTES = {code: dtype.itemsize for dtype, code in DTYPE_CODES.items()}
CHUNK_BYTES = 2**24
MAX_READ_BYTES = 2**30  # Linux gives less than 2 GiB at once
MAX_HEADER_BYTES = 100_000_000  # the library's own limit


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a tensor, as the header has them."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FileRecord:
    """Size and sha256 of a whole file."""

    num_bytes: int
    sha256: str


def write_tensors(path: Path, specs: Sequence[TensorSpec], tensors: Iterable[Tensor]) -> FileRecord:
    """Write the file and return when it is on disk. `tensors` come in the order of `specs`, one at a time."""
    digest = hashlib.sha256()
    with open_new(path, buffering=0) as file, ThreadPoolExecutor(1) as hasher:
        for chunk in _chunks(specs, tensors):
            hashing = hasher.submit(digest.update, chunk)  # beside the writing: neither holds the GIL
            _write_all(file, chunk)
            _flush_soon(file)
            hashing.result()
        sync_open(file.fileno())
        return FileRecord(file.tell(), digest.hexdigest())


def _write_all(file: Any, chunk: memoryview) -> None:
    """Write all bytes: a raw file may take fewer than it is given, on a full disk or from 2 GiB on."""
    while chunk:
        chunk = chunk[file.write(chunk) :]


def _flush_soon(file: Any) -> None:
    """Start writing to disk now, instead of when the page cache is full."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _chunks(specs: Sequence[TensorSpec], tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    yield memoryview(_header(specs))
    remaining = iter(tensors)
    for spec in specs:  # not zip: it would hold a tensor until the next one is there
        data = _data(spec, next(remaining))
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]
        del data


def _data(spec: TensorSpec, tensor: Tensor) -> memoryview:
    if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
        raise ValueError(f"{spec.name}: found {tensor.dtype}{list(tensor.shape)}, announced as {spec}")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(specs: Sequence[TensorSpec]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for spec in specs:
        stop = start + spec.num_bytes
        header[spec.name] = {"dtype": DTYPE_CODES[spec.dtype], "shape": spec.shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins aligned
    return len(text).to_bytes(8, "little") + text


class TensorFile:
    """The float32 tensors of a safetensors file, read in parts and not mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path) as file:
                size, total = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
                header = parse_json(file.read(min(size, MAX_HEADER_BYTES)))
            self._start = 8 + size
            self._entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            self.shapes = {name: tuple(entry["shape"]) for name, entry in self._entries.items()}
            _check_entries(self._entries, total - self._start)
        except (FileNotFoundError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error!r}") from error

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements start to stop of the flattened tensor, float32[stop - start]."""
        entry = self._entries[name]
        if entry["dtype"] != "F32":
            raise CheckpointError(f"{self.path}: {name} is {entry['dtype']}; expected F32")
        at = self._start + entry["data_offsets"][0] + 4 * start
        values = np.empty(stop - start, dtype="<f4")  # of torch, aligned memory that is freed would leave holes
        with self.path.open("rb", buffering=0) as file:  # not numpy.fromfile: it takes a failed read for the end
            file.seek(at)
            if not _read_all(file, values.view(np.uint8).data):
                raise CheckpointError(f"{self.path} ends within {name}")
        return torch.from_numpy(values)


def _check_entries(entries: Mapping[str, Any], num_bytes: int) -> None:
    """Raise ValueError unless the tensors fill the data in turn, each as long as its shape says."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda pair: pair[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*entry["shape"], start, stop)):
            raise ValueError(f"{name}: found {entry!r:.80}; expected whole numbers from 0")
        length = math.prod(entry["shape"]) * ITEM_BYTES.get(entry["dtype"], 0)
        if start != position or (length and stop - start != length) or stop < start:
            raise ValueError(
                f"{name}: found data at {start} to {stop}; expected {length or 'some'} bytes at {position}"
            )
        position = stop
    if position > num_bytes:
        raise ValueError(f"found {num_bytes} bytes of data; expected {position}")


def _read_all(file: Any, values: memoryview) -> bool:
    """Fill `values` from a raw file, which may give fewer bytes than it is asked for; False if it ends before."""
    while values:
        num_bytes = file.readinto(values[:MAX_READ_BYTES])
        if not num_bytes:
            return False
        values = values[num_bytes:]
    return True


def hash_file(path: Path) -> FileRecord:
    """Return the record of any file, as write_tensors does."""
    digest, num_bytes = hashlib.sha256(), 0
    for chunk in read_chunks(path):
        digest.update(chunk)
        num_bytes += len(chunk)
    return FileRecord(num_bytes, digest.hexdigest())


def read_chunks(path: Path) -> Iterator[memoryview]:
    """Yield a file in parts, each valid until the next."""
    with open_regular(path) as file:
        buffer = memoryview(bytearray(CHUNK_BYTES if os.fstat(file.fileno()).st_size > CHUNK_BYTES else 2**16))
        while num_bytes := file.raw.readinto(buffer):
            yield buffer[:num_bytes]
