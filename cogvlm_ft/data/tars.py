"""Find the samples in a WebDataset tar, even a damaged one, without reading their data."""

from __future__ import annotations

import errno
import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from cogvlm_ft.errors import DataError
from cogvlm_ft.runtime.watchdog import progress

IMAGE_FORMATS = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif", "mpo"),
    "PNG": ("png", "apng"),
    "WEBP": ("webp",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
    "GIF": ("gif",),
    "AVIF": ("avif",),
    "JPEG2000": ("jp2", "j2k", "jpx", "jpf", "j2c", "jpc"),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
    "QOI": ("qoi",),
}
"""Names of Pillow's formats and their extensions: those that it decodes itself and knows by their first bytes.

Not EPS, for which it starts another program, nor TGA, as which it would read damaged files of other formats.
"""

IMAGE_EXTENSIONS = tuple(extension for extensions in IMAGE_FORMATS.values() for extension in extensions)

RECORD_EXTENSIONS = ("json", "jsn", "annotation.json", "annotation.jsn", "annotations.json", "annotations.jsn")
"""The members of a sample that may hold its record; of several, the first of this order does."""

MAX_MEMBER_BYTES = 1 << 30
"""Largest image that is read, because it is read into memory as a whole."""

MAX_RECORD_BYTES = 1 << 26
"""Largest record that is read. Parsing takes up to 50 times as much memory; a million boxes fit."""

MAX_KEY_BYTES = 1 << 10
"""Longest key, because the keys of a split are an array whose elements are as long as the longest."""

_BLOCK = tarfile.BLOCKSIZE
_CHUNK, _FETCHED = 1 << 18, 1 << 22  # bytes of zeros at once, from a disk and from a server
_MAX_PADDING_BYTES = 1 << 20  # zeros between members or at the end; tar itself pads to 10 KiB
_MAX_ZEROS_FETCHED = 1 << 26  # of a tar on a server, where zeros cannot be skipped: what follows counts as zeros too
_MAX_NAMED = 6  # members in a message
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
    """A part of a tar that cannot be used; `key` is empty if unknown, and `detail` if the reason says it all."""

    shard: str
    key: str
    reason: str
    detail: str = ""


class Scan(NamedTuple):
    """Contents of a tar. notes: what was decided although nothing is lost, such as which of two images is the photo."""

    entries: list[Entry]
    losses: list[Loss]
    notes: list[Loss]


@dataclass(slots=True)
class _Parts:
    """Members of one key. places: offset and size of those that can be used. others: extensions of the rest."""

    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    is_damaged: bool = False

    def images(self) -> list[str]:
        return [extension for extension in self.places if extension in IMAGE_EXTENSIONS]

    def records(self) -> list[str]:
        return [extension for extension in RECORD_EXTENSIONS if extension in self.places]


def scan_tar(path: Path) -> Scan:
    """List all complete samples (an image and a record of one key) in order of appearance, and what was lost.

    The key is the name up to the first dot of its last part, as in WebDataset. Damage affects the damaged samples only.
    Raises DataError for a compressed tar.
    """
    with path.open("rb") as file:
        return scan_file(file, path.stat().st_size, path.name, str(path))


def scan_file(file: BinaryIO, size: int, name: str, shown: str) -> Scan:
    """Scan an opened tar of `size` bytes. name: for losses. shown: for errors."""
    samples: dict[str, _Parts] = {}
    losses: list[Loss] = []
    if size == 0:  # what an interrupted copy leaves; an empty tar has two blocks of zeros
        losses.append(Loss(name, "", "empty_file", "found 0 bytes; expected a tar. Copy it again, or remove it"))
    _refuse_compressed(shown, file.read(6))
    end = 0
    for member in _members(file, size):
        progress()
        losses += _losses_between(file, end, member.offset, name)
        end = min(size, member.offset_data + -(-member.size // _BLOCK) * _BLOCK)
        reason = _sort_in(samples, member, size)
        if reason:
            losses.append(Loss(name, _split_name(member.name)[0][:MAX_KEY_BYTES], reason))
    losses += _losses_between(file, end, size, name)
    return _judged(samples, losses, name)


def _judged(samples: dict[str, _Parts], losses: list[Loss], shard: str) -> Scan:
    """Sort the samples into entries and losses."""
    scan = Scan([], losses, [])
    explained = {loss.key for loss in losses}
    have_masks = any(len(_photos(parts)) == 1 < len(parts.images()) for parts in samples.values())
    for key, parts in samples.items():
        dotted = _dotted_stems(parts)
        losses += [Loss(shard, f"{key}.{stem}", "dotted_key", _why_dotted(key, stem)) for stem in dotted]
        photos = _photos(parts)
        if have_masks and parts.images() == ["png"] and len(photos) == 1:
            detail = f"found {key}.png; expected {key}.jpg too: in this tar a PNG beside a JPEG is a mask"
            losses.append(Loss(shard, key, "no_image", detail))
        elif len(photos) == 1 and parts.records() and not parts.is_damaged:
            scan.notes.extend(_choices(shard, key, parts))
            scan.entries.append(Entry(key, photos[0], *parts.places[photos[0]], *parts.places[parts.records()[0]]))
        elif len(photos) > 1:
            detail = f"found {_named(key, photos)}; expected one photo. Name the other like {key}.mask.png"
            losses.append(Loss(shard, key, "several_images", detail))
        elif key not in explained and (parts.places or not dotted):
            losses.append(_incomplete(shard, key, parts, "no_json" if photos else "no_image"))
    return scan


def _choices(shard: str, key: str, parts: _Parts) -> Iterator[Loss]:
    """Yield a note for every choice between two members."""
    for reason, found, taken in (
        ("several_images", parts.images(), f"{key}.{_photos(parts)[0]}, because a PNG beside a JPEG is a mask"),
        ("several_records", parts.records(), f"{key}.{parts.records()[0]}"),
    ):
        if len(found) > 1:
            yield Loss(shard, key, reason, f"found {_named(key, found)}; took {taken}")


def _incomplete(shard: str, key: str, parts: _Parts, reason: str) -> Loss:
    expected = f"{key}.json" if reason == "no_json" else f"{key}.jpg, or another of {', '.join(IMAGE_EXTENSIONS)}"
    return Loss(shard, key, reason, f"found {_named(key, [*parts.places, *parts.others])}; expected {expected}")


def _named(key: str, extensions: list[str]) -> str:
    names = [f"{key}.{extension}" for extension in extensions[:_MAX_NAMED]]
    return " and ".join(names) + (" ..." if len(extensions) > _MAX_NAMED else "")


def _photos(parts: _Parts) -> list[str]:
    """Return the images that may be the photo: beside a JPEG, a PNG is a mask."""
    images = parts.images()
    jpegs = [extension for extension in images if extension in IMAGE_FORMATS["JPEG"]]
    return jpegs if jpegs and set(images) - set(jpegs) <= set(IMAGE_FORMATS["PNG"]) else images


def _dotted_stems(parts: _Parts) -> list[str]:
    """Return stems such as `0001` of members 0001.jpg and 0001.json, which were meant as separate samples."""
    ends: dict[str, set[str]] = {}
    for extension in parts.others:
        stem, _, end = extension.rpartition(".")
        if stem:
            ends.setdefault(stem, set()).add(end)
    return [stem for stem, found in ends.items() if found & set(IMAGE_EXTENSIONS) and found & {"json", "jsn"}]


def _why_dotted(key: str, stem: str) -> str:
    return (
        f"found {key}.{stem}.*; expected no further dot: a key ends at the first dot, as in WebDataset, so this is a "
        f"part of {key!r}. Rename it, such as {key}_{stem}.*"
    )


def _refuse_compressed(path: str, start: bytes) -> None:
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"{path}: found {name} compression; expected a plain .tar, because samples are read in place. "
                "Decompress it, or set data.cache_dir"
            )


def _members(file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo]:
    """Yield every member whose header is readable; damaged headers are skipped block by block."""
    start = 0
    while start < size:
        file.seek(start)
        headers, tar = _Headers(file, size), None
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
        except _ZerosError as zeros:
            start = zeros.end
        except (tarfile.TarError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError):
            # A damaged long-name or pax header, too many of them in a row, or the end of the file inside a member.
            # tarfile gives up here, with nearly any error; intact samples may follow.
            start = max(start + _BLOCK, headers.last_read, min(tar.offset, size) if tar else 0)


class _ZerosError(Exception):
    """There are zeros in place of a header; tarfile would read them block by block. end: offset of what follows."""

    def __init__(self, end: int) -> None:
        self.end = end


class _Headers:
    """File for tarfile, which reads only headers from it; refuses headers far longer than any path.

    Such a header is damaged, and tarfile would need time and memory quadratic in its length.

    last_read: offset of the last header or of its content.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.name, self.mode = "", "rb"
        self._file, self._size = file, size
        self.seek, self.tell = file.seek, file.tell
        self.last_read = 0

    def read(self, size: int) -> bytes:
        if size >= _BLOCK:
            self.last_read = self.tell()
        if size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        data = self._file.read(size)
        if size == _BLOCK and data and not data.strip(b"\0"):
            raise _ZerosError(_end_of_zeros(self._file, self.tell(), self._size))
        if size > _BLOCK and _LONG_NUMBER.search(data):
            raise tarfile.ReadError("a header with a number that is too long")
        return data


def _sort_in(samples: dict[str, _Parts], member: tarfile.TarInfo, tar_size: int) -> str | None:
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
    if len(key.encode("utf-8", "backslashreplace")) > MAX_KEY_BYTES:
        return "long_key"
    parts = samples.setdefault(key, _Parts())
    if extension not in IMAGE_EXTENSIONS and extension not in RECORD_EXTENSIONS:
        parts.others.append(extension)
        return None
    most = MAX_RECORD_BYTES if extension in RECORD_EXTENSIONS else MAX_MEMBER_BYTES
    if member.offset_data + member.size > tar_size or member.size > most:
        parts.is_damaged = True
        return "truncated" if member.offset_data + member.size > tar_size else "too_large"
    if extension in parts.places:
        return "duplicate_member"
    parts.places[extension] = member.offset_data, member.size
    return None


def _split_name(name: str) -> tuple[str, str]:
    """Split a name into (key, lower-case extension); two empty strings if it has no key."""
    match = _KEY_AND_EXTENSION.fullmatch(name.removeprefix("./"))
    return (match[1], match[2].lower()) if match else ("", "")


def _losses_between(file: BinaryIO, start: int, end: int, shard: str) -> Iterator[Loss]:
    """Yield a loss if the bytes between two members are neither padding nor a global pax header."""
    position = file.tell()
    first = _end_of_zeros(file, start, end)
    if first < end:
        file.seek(first)
        if not _is_global_header(file.read(_BLOCK)):
            yield Loss(shard, "", "damaged_header")
    elif end - start > _MAX_PADDING_BYTES:
        detail = f"{end - start} bytes of zeros from byte {start} on; expected members. Copy the tar again"
        yield Loss(shard, "", "zeros", detail)
    file.seek(position)


def _end_of_zeros(file: BinaryIO, start: int, end: int) -> int:
    """Return the offset of the first block after `start` that is not all zeros, `end` if there is none.

    Holes of a local file are skipped without reading them.
    """
    position, is_remote = start, not isinstance(file, io.BufferedReader)
    while position < end:
        progress()
        if is_remote:
            if position - start >= _MAX_ZEROS_FETCHED:
                return end
            file.seek(position)
            data = file.read(min(_FETCHED, end - position))
        else:
            position = _start_of_data(file.fileno(), position, start)
            data = os.pread(file.fileno(), min(_CHUNK, max(0, end - position)), position)
        if data != bytes(len(data)):  # the fast comparison
            found = position + len(data) - len(data.lstrip(b"\0")) - start
            return min(end, start + found // _BLOCK * _BLOCK)
        if not data:
            return end
        position += len(data)
    return end


def _start_of_data(file: int, position: int, start: int) -> int:
    """Return where the next data of a sparse file begin, in whole blocks from `start`; `position` for other files."""
    before = os.lseek(file, 0, os.SEEK_CUR)
    try:
        found = os.lseek(file, position, os.SEEK_DATA)
        return max(position, start + (found - start) // _BLOCK * _BLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a hole up to the end
            return os.fstat(file).st_size
        return position
    finally:
        os.lseek(file, before, os.SEEK_SET)  # the buffered reader relies on it


def _is_global_header(block: bytes) -> bool:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").type == tarfile.XGLTYPE
    except tarfile.TarError:
        return False
