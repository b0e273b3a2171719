"""Find the samples in a WebDataset tar, even a damaged one, without reading their data."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from cogvlm_ft.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")

MAX_MEMBER_BYTES = 1 << 30
"""Largest image or record that is read, because it is read into memory as a whole."""

_BLOCK = tarfile.BLOCKSIZE
_MAX_HEADER_BYTES = 1 << 14  # of a long name or a pax header; a path has at most 4096
_LONG_NUMBER = re.compile(rb"[0-9]{256}")  # no part of a path is longer
_KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Entry(NamedTuple):
    """Location of one sample in its tar: byte offsets and sizes of the data, not of the headers."""

    key: str
    ext: str
    image_offset: int
    image_num_bytes: int
    json_offset: int
    json_num_bytes: int


class Loss(NamedTuple):
    """A part of a tar that cannot be used; `key` is empty if unknown."""

    shard: str
    key: str
    reason: str


def scan_tar(path: Path) -> tuple[list[Entry], list[Loss]]:
    """List all complete samples (an image and a .json of one key) in order of appearance, and what was lost.

    The key is the name up to the first dot of its last part, as in WebDataset. Damage affects the damaged samples only.
    Raises DataError for a compressed tar.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    losses: list[Loss] = []
    size = path.stat().st_size
    with path.open("rb") as file:
        _refuse_compressed(path, file.read(6))
        end = 0
        for member in _members(file, size):
            if _is_damaged(file, end, member.offset):
                losses.append(Loss(path.name, "", "damaged_header"))
            end = min(size, member.offset_data + -(-member.size // _BLOCK) * _BLOCK)
            reason = _sort_in(samples, member, size)
            if reason:
                losses.append(Loss(path.name, _split_name(member.name)[0], reason))
        if _is_damaged(file, end, size):
            losses.append(Loss(path.name, "", "damaged_header"))
    entries = []
    explained = {loss.key for loss in losses}
    for key, parts in samples.items():
        missing = _missing_part(parts)
        if not missing:
            entries.append(_entry(key, parts))
        elif key not in explained:
            losses.append(Loss(path.name, key, missing))
    return entries, losses


def _refuse_compressed(path: Path, start: bytes) -> None:
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"{path}: found {name} compression; expected a plain .tar, because samples are read in place. "
                "Decompress it"
            )


def _members(file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo]:
    """Yield every member whose header is readable; damaged headers are skipped block by block."""
    start = 0
    while start < size:
        file.seek(start)
        headers, tar = _Headers(file), None
        try:
            tar = tarfile.TarFile(fileobj=headers, ignore_zeros=True, errors="surrogateescape")  # type: ignore[arg-type]
            while (member := tar.next()) is not None:
                start = member.offset_data
                if member.size >= 0:
                    yield member
                if not 0 <= member.size <= size - member.offset_data:
                    break  # truncated or of a wrong size: intact samples may follow. A negative size sends tarfile back
            else:
                return
        except (tarfile.TarError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError):
            # A damaged long-name or pax header, too many of them in a row, or the end of the file inside a member.
            # tarfile gives up here, with nearly any error; intact samples may follow.
            start = max(start + _BLOCK, headers.last_read, min(tar.offset, size) if tar else 0)


class _Headers:
    """File for tarfile, which reads only headers from it; refuses headers far longer than any path.

    Such a header is damaged, and tarfile would need time and memory quadratic in its length.

    last_read: offset of the last header or of its content.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.name, self.mode = "", "rb"
        self._file = file
        self.seek, self.tell = file.seek, file.tell
        self.last_read = 0

    def read(self, size: int) -> bytes:
        if size >= _BLOCK:
            self.last_read = self.tell()
        if size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        data = self._file.read(size)
        if size > _BLOCK and _LONG_NUMBER.search(data):
            raise tarfile.ReadError("a header with a number that is too long")
        return data


def _sort_in(samples: dict[str, dict[str, tuple[int, int]]], member: tarfile.TarInfo, tar_size: int) -> str | None:
    """Add the member to its sample; return the reason if it cannot be used."""
    if member.isdir():
        return None
    if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
        return "unsafe_name"
    if not member.isreg() or member.issparse():
        return "not_a_regular_file"
    key, extension = _split_name(member.name)
    if not key:
        return None  # a hidden file, or one without extension: WebDataset ignores it too
    if extension not in (*IMAGE_EXTENSIONS, "json"):
        samples.setdefault(key, {})
        return None
    if member.offset_data + member.size > tar_size:
        return "truncated"
    if member.size > MAX_MEMBER_BYTES:
        return "too_large"
    if extension in samples.setdefault(key, {}):
        return "duplicate_member"
    samples[key][extension] = member.offset_data, member.size
    return None


def _split_name(name: str) -> tuple[str, str]:
    """Split a name into (key, lower-case extension); two empty strings if it has no key."""
    match = _KEY_AND_EXTENSION.fullmatch(name.removeprefix("./"))
    return (match[1], match[2].lower()) if match else ("", "")


def _is_damaged(file: BinaryIO, start: int, end: int) -> bool:
    """Return True if the bytes between two members are neither padding nor a global pax header."""
    position = file.tell()
    file.seek(start)
    damaged = False
    while start < end:
        block = file.read(_BLOCK)
        start += _BLOCK
        if block.strip(b"\0"):
            damaged = not _is_global_header(block)
            break
    file.seek(position)
    return damaged


def _is_global_header(block: bytes) -> bool:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").type == tarfile.XGLTYPE
    except tarfile.TarError:
        return False


def _missing_part(parts: dict[str, tuple[int, int]]) -> str | None:
    if not any(extension in parts for extension in IMAGE_EXTENSIONS):
        return "no_image"
    return None if "json" in parts else "no_json"


def _entry(key: str, parts: dict[str, tuple[int, int]]) -> Entry:
    ext = next(extension for extension in parts if extension != "json")
    return Entry(key, ext, *parts[ext], *parts["json"])
