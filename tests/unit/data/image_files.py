"""PNG and TIFF files of kinds of pixels that Pillow cannot write."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
_SAMPLE_FORMATS = {"u": 1, "i": 2, "f": 3}


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_16(values: NDArray[np.uint16], *extra: tuple[bytes, bytes]) -> bytes:
    """Encode [H, W] or [H, W, 2 to 4] as a 16-bit PNG. extra: chunks (kind, content) before the pixels."""
    height, width, channels = values.reshape(*values.shape[:2], -1).shape
    header = struct.pack(">IIBBBBB", width, height, 16, _COLOUR_TYPES[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def tiff(
    values: NDArray[np.generic],
    *,
    order: str = "<",
    compressed: bool = False,
    photometric: int | None = None,
    planes: bool = False,
    nodata: str = "",
) -> bytes:
    """Encode [H, W] or [H, W, 3] as a TIFF of one strip, or of one for each colour. order: "<" or ">"."""
    height, width, channels = values.reshape(*values.shape[:2], -1).shape
    parts = np.moveaxis(values, -1, 0) if planes else [values]
    strips = [part.astype(part.dtype.newbyteorder(order)).tobytes() for part in parts]
    strips = [zlib.compress(strip) for strip in strips] if compressed else strips
    kind, bits = values.dtype.kind, values.dtype.itemsize * 8
    default = 2 if channels == 3 else 1
    tags: dict[int, tuple[int, list[int] | bytes]] = {
        256: (3, [width]), 257: (3, [height]), 258: (3, [bits] * channels), 259: (3, [8 if compressed else 1]),
        262: (3, [default if photometric is None else photometric]), 273: (4, [0] * len(strips)),
        277: (3, [channels]), 278: (3, [height]), 279: (4, [len(strip) for strip in strips]),
        284: (3, [2 if planes else 1]), 339: (3, [_SAMPLE_FORMATS[kind]] * channels),
    }  # fmt: skip
    if nodata:
        tags[42113] = (2, nodata.encode() + b"\0")
    return _with_strips(tags, strips, order)


def _with_strips(tags: dict[int, tuple[int, list[int] | bytes]], strips: list[bytes], order: str) -> bytes:
    directory_bytes = 2 + 12 * len(tags) + 4
    place = 8 + directory_bytes + 64 * len(tags)
    tags[273] = (4, [place + sum(map(len, strips[:i])) for i in range(len(strips))])
    directory, long_values = struct.pack(order + "H", len(tags)), b""
    for tag, (kind, value) in sorted(tags.items()):
        content = value if isinstance(value, bytes) else struct.pack(f"{order}{len(value)}{'HI'[kind - 3]}", *value)
        directory += struct.pack(order + "HHI", tag, kind, len(value))
        if len(content) <= 4:
            directory += content.ljust(4, b"\0")
        else:
            directory += struct.pack(order + "I", 8 + directory_bytes + len(long_values))
            long_values += content + bytes(len(content) % 2)
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    head = start + directory + bytes(4) + long_values
    return head.ljust(place, b"\0") + b"".join(strips)
