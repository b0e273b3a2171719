"""Regions of Label Studio: percent of the photo -> boxes in pixels; and the addresses of photos -> paths."""

from __future__ import annotations

import base64
import posixpath
import re
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from cogvlm_ft.data.record import is_finite_number
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.formats.shapes import box_around, box_around_ellipse, box_around_rotated
from cogvlm_ft.shards.packing.candidates import Rejected, four_numbers, image_path, require, shown

SHAPES = ("rectangle", "polygon", "ellipse", "brush", "keypoint")
_UPLOAD = re.compile(r"(^|/)upload/[0-9]+/[^/]+$")
_MAX_MASK_BYTES = 4 * 10**8
_SIZE_BITS = (32, 5, 4)
"""Number of bits of each header field: number of values, bits per value, bits of each kind of run length."""


def photo_paths(address: str) -> list[str]:
    """Return how the file of this address may be called, the most likely name first. Raises Rejected.

    Addresses are paths of uploads, /data/local-files/?d=..., URLs and those of cloud storages.
    """
    if address.startswith("data:"):
        raise Rejected("sample", "embedded_image", "the photo is inside the task; expected a file. Save it as one.")
    path = address
    try:
        if "://" in address or address.startswith("/"):
            parts = urlsplit(address)
            query = parse_qs(parts.query)
            path = unquote(parts.path)
            if "d" in query and "local-files" in path:
                path = query["d"][0]
            elif "fileuri" in query:
                return photo_paths(base64.b64decode(query["fileuri"][0].replace(" ", "+")).decode())
    except ValueError as error:
        raise Rejected("sample", "bad_field", f"the address of the photo is {shown(address)}: {error}") from None
    path = image_path(path.lstrip("/") or None, "the address of the photo")
    return [path, posixpath.basename(path)] if _UPLOAD.search(path) else [path]


def region_box(kind: str, value: dict[str, Any], size: tuple[int, int] | None) -> Box:
    """Return the box around a region: in pixels, or as fractions of the photo if its size is unknown.

    kind: one of SHAPES. Raises Rejected if the region has no area or cannot be read.
    """
    if kind == "keypoint":
        raise Rejected("box", "no_area", "a key point has no area. Draw a box if the object is to be found.")
    if kind == "brush":
        require(value.get("format") == "rle" and size is not None, "box", "the brush", "no rle, or no size", "both")
        assert size is not None
        return _mask_box(value.get("rle"), size)
    width, height = size or (1, 1)
    if kind == "polygon":
        points: Any = value.get("points")
        good = isinstance(points, list) and len(points) > 2 and all(map(_is_point, points))
        require(good, "box", '"points"', points, "a list of three or more [x, y]")
        return box_around([(x * width / 100, y * height / 100) for x, y in points])
    degrees = value.get("rotation") or 0
    require(is_finite_number(degrees), "box", '"rotation"', degrees, "a number")
    if degrees % 360 and size is None:
        raise Rejected("box", "no_size", "a rotated region without original_width and original_height")
    names = ("x", "y", "radiusX", "radiusY") if kind == "ellipse" else ("x", "y", "width", "height")
    a, b, c, d = four_numbers([value.get(name) for name in names], f"{', '.join(names)} in percent")
    x, y, along, down = a * width / 100, b * height / 100, c * width / 100, d * height / 100
    if kind == "ellipse":
        return box_around_ellipse((x, y), (along, down), degrees)
    return box_around_rotated((x, y, x + along, y + down), degrees, (x, y)) if degrees else (x, y, x + along, y + down)


def _is_point(point: Any) -> bool:
    return isinstance(point, list) and len(point) == 2 and all(map(is_finite_number, point))


def _mask_box(rle: Any, size: tuple[int, int]) -> Box:
    """Return the box around the pixels of a brush: where the fourth value of a pixel, its opacity, is not 0."""
    width, height = size
    good = isinstance(rle, list) and all(type(byte) is int and 0 <= byte < 256 for byte in rle)
    require(good, "box", '"rle"', rle, "a list of bytes")
    require(4 * width * height <= _MAX_MASK_BYTES, "box", "the size", size, "a smaller photo")
    try:
        opaque = _unpacked(bytes(rle), 4 * width * height)[3::4].reshape(height, width) > 0
    except ValueError as error:
        raise Rejected("box", "bad_field", f'"rle" of a brush: {error}; expected the form of Label Studio') from None
    rows, columns = np.flatnonzero(opaque.any(axis=1)), np.flatnonzero(opaque.any(axis=0))
    if not len(rows):
        raise Rejected("box", "empty_mask", "no pixel of the brush is set")
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


class _Bits:
    """Reads unsigned numbers from bytes, the highest bit first."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def read(self, num_bits: int) -> int:
        end = self._place + num_bits
        if end > 8 * len(self._data):
            raise ValueError("it ends too early")
        first, last = self._place >> 3, (end + 7) >> 3
        value = int.from_bytes(self._data[first:last], "big") >> (8 * last - end)
        self._place = end
        return value & ((1 << num_bits) - 1)


def _unpacked(data: bytes, num_values: int) -> np.ndarray:
    """Unpack run lengths. Raises ValueError.

    Each has a flag, the kind of its length, the length - 1, then one value that is repeated, or as many values.
    """
    bits = _Bits(data)
    count = bits.read(_SIZE_BITS[0])
    if count != num_values:
        raise ValueError(f"it has {count} values, the photo {num_values}")
    value_bits = bits.read(_SIZE_BITS[1]) + 1
    length_bits = [bits.read(_SIZE_BITS[2]) + 1 for _ in range(4)]
    values = np.zeros(num_values, dtype=np.uint8)
    place = 0
    while place < num_values:
        is_run = bits.read(1)
        end = place + 1 + bits.read(length_bits[bits.read(2)])
        if end > num_values:
            raise ValueError("a run is too long")
        if is_run:
            values[place:end] = bits.read(value_bits) & 0xFF
        else:
            for i in range(place, end):
                values[i] = bits.read(value_bits) & 0xFF
        place = end
    return values
