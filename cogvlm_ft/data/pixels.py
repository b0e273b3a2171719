"""Open image files, and convert their pixels to 8-bit RGB by one rule, in builds, training and prediction alike.

8 bits per channel: as Pillow converts them; alpha is dropped. More (16-bit grey and colour, 32-bit, floating point):
the image's own range is scaled linearly to 0..255. The lowest and the highest 0.1 % of its values become 0 and 255, so
that a few defective pixels do not decide. One range for all colours; NaN becomes black.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from cogvlm_ft.data.tars import IMAGE_FORMATS

PILLOW_FORMATS = tuple(IMAGE_FORMATS)

CUT_FRACTION = 0.001
"""Fraction of the values that become black, and of those that become white."""
_BLOCK_ROWS = 64

_8_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
_SCALED_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_NATIVE = "L" if sys.byteorder == "little" else "B"
_AS_LIBTIFF_GIVES_THEM = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}
"""Native byte order, which Pillow overlooks for these values of a compressed TIFF."""

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT, _GDAL_NODATA = 258, 262, 339, 42113  # tags of TIFF
_WHITE_IS_ZERO, _SIGNED = 0, 2

MAX_JPEG_SCANS = 100
"""Maximum number of scans in a JPEG: encoders write about ten, and each one covers all pixels."""
MAX_SCANNED_PIXELS = 2_000_000_000
"""Maximum number of pixels in all scans of a JPEG together: about half a minute of decoding."""

_JPEG = b"\xff\xd8"
_START_OF_SCAN = np.frombuffer(b"\xff\xda", np.uint16)[0]
_PNG = b"\x89PNG\r\n\x1a\n"
_WITHOUT_PIXELS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")

_UNKNOWN_TIFF = "a damaged TIFF, or one of an unsupported kind of pixel (such as 16-bit or 64-bit floating point)"
_KINDS = (
    (0, b"GIF8", "GIF"),
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftypmsf1", "HEIF"),
    (4, b"ftyp", "a video"),
    (4, b"jP  \r\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (4, b"JXL \r\n", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (128, b"DICM", "DICOM"),
    (0, b"8BPS", "Photoshop"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"<svg", "SVG"),
    (0, b"II*\0", _UNKNOWN_TIFF),
    (0, b"MM\0*", _UNKNOWN_TIFF),
    (0, b"II+\0", _UNKNOWN_TIFF),
    (0, b"MM\0+", _UNKNOWN_TIFF),
)


class UnsupportedPixelsError(ValueError):
    """An image whose values have no known range."""


def open_image(data: bytes, formats: tuple[str, ...] = PILLOW_FORMATS) -> Image.Image:
    """Open an encoded image without decoding it. Raises whatever Pillow raises on broken bytes.

    Pillow's limits do not apply: callers check the number of pixels, and large texts in a PNG are skipped.
    """
    Image.MAX_IMAGE_PIXELS = None  # Pillow's limit only warns up to twice its value
    image = Image.open(io.BytesIO(without_texts(data)), formats=formats)
    if data.startswith(_JPEG):
        _check_scans(image.size, _num_scans(data))
    return image


def _num_scans(data: bytes) -> int:
    """Count the starts of scans, at even and at odd offsets: three times as fast as `data.count`."""
    pairs = [np.frombuffer(data, np.uint16, (len(data) - first) // 2, first) for first in (0, 1)]
    return sum(int(np.count_nonzero(found == _START_OF_SCAN)) for found in pairs)


def _check_scans(size_px: tuple[int, int], num_scans: int) -> None:
    """Raise UnsupportedPixelsError for a JPEG whose scans would take minutes to decode."""
    most = min(MAX_JPEG_SCANS, max(1, MAX_SCANNED_PIXELS // max(1, size_px[0] * size_px[1])))
    if num_scans > most:
        raise UnsupportedPixelsError(f"a JPEG of {num_scans} scans; expected at most {most}. Save the image again")


def without_texts(data: bytes) -> bytes:
    """Return a PNG without texts and colour profile, which Pillow unpacks up to a limit; other data as it is."""
    if not data.startswith(_PNG):
        return data
    chunks = list(_png_chunks(data))
    if not any(kind in _WITHOUT_PIXELS for kind, _, _ in chunks):
        return data
    rest = data[chunks[-1][2] :]
    return b"".join([_PNG, *(data[start:end] for kind, start, end in chunks if kind not in _WITHOUT_PIXELS), rest])


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start, end) of every complete chunk."""
    start = len(_PNG)
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if end > len(data):
            return
        yield data[start + 4 : start + 8], start, end
        start = end


def kind_of(data: bytes) -> str:
    """Name the kind of file, if it is one that is often taken for a supported image; else ""."""
    return next((name for at, magic, name in _KINDS if data[at : at + len(magic)] == magic), "")


def to_rgb(image: Image.Image, data: bytes) -> Image.Image:
    """Decode an opened image of `data` as 8-bit RGB. Raises UnsupportedPixelsError, and whatever Pillow raises."""
    values = _wide_values(image, data)
    if values is None:
        if image.mode not in _8_BIT_MODES:
            expected = "8-bit grey or colour, 16-bit, 32-bit, or floating point"
            raise UnsupportedPixelsError(f"pixels of mode {image.mode}; expected {expected}. Convert the image to RGB")
        return image.convert("RGB")
    scaled = _scale(values, _nodata(image))
    if _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO:
        scaled = 255 - scaled
    return Image.fromarray(scaled).convert("RGB")


def _wide_values(image: Image.Image, data: bytes) -> NDArray[Any] | None:
    """Return the values [H, W] or [H, W, 3] of an image with more than 8 bits, or signed ones; None for others."""
    codec, rawmode = _unpacking(image)
    is_signed = _tag(image, _SAMPLE_FORMAT) == _SIGNED
    if image.mode in _SCALED_MODES:
        if codec == "libtiff" and rawmode in _AS_LIBTIFF_GIVES_THEM:
            return np.asarray(_opened_as(data, _AS_LIBTIFF_GIVES_THEM[rawmode]))
        values = np.asarray(image)
        return values if image.mode != "I" or is_signed else values.view(np.uint32)
    if image.mode == "L" and is_signed:
        return np.asarray(image).view(np.int8)
    if not rawmode and (_tag(image, _BITS) or 8) > 8:  # Pillow takes the bytes of one value for two pixels
        raise UnsupportedPixelsError("a TIFF of 16 bits in separate planes; expected its colours pixel by pixel")
    if rawmode == "LA;16B":  # Pillow keeps the upper bytes only: its four bytes of a pixel read as four channels
        upper = np.asarray(_opened_as(data, "RGBA"))
        return upper[..., 0].astype(np.uint16) << 8 | upper[..., 1]
    colours, _, order = rawmode.partition(";16")
    if colours not in ("RGB", "RGBA", "RGBX") or order not in ("B", "L", "N"):
        return None
    order = _NATIVE if order == "N" else order
    lower = np.asarray(_opened_as(data, f"{colours};16{'L' if order == 'B' else 'B'}"))  # in the other byte order
    return np.asarray(image)[..., :3].astype(np.uint16) << 8 | lower[..., :3]


def _unpacking(image: Image.Image) -> tuple[str, str]:
    """Return how Pillow will decode and unpack an image that is not decoded yet; "" where its parts differ."""
    tiles = getattr(image, "tile", ())
    codecs = {tile[0] for tile in tiles}
    rawmodes = {tile[3] if isinstance(tile[3], str) else str((tile[3] or ("",))[0]) for tile in tiles}
    return codecs.pop() if len(codecs) == 1 else "", rawmodes.pop() if len(rawmodes) == 1 else ""


def _opened_as(data: bytes, rawmode: str) -> Image.Image:
    """Open the image again, to be unpacked in another way."""
    image = open_image(data)
    assert isinstance(image, ImageFile.ImageFile)
    image.tile = [
        tile._replace(args=rawmode if isinstance(tile.args, str) else (rawmode, *(tile.args or ())[1:]))
        for tile in image.tile
    ]
    return image


def _tag(image: Image.Image, tag: int) -> Any:
    """Return the value of a tag of a TIFF, of several equal ones the first; None for other images."""
    value = getattr(image, "tag_v2", {}).get(tag)
    return value[0] if isinstance(value, tuple) and value else value


def _nodata(image: Image.Image) -> float | None:
    """Return the value that marks pixels without data in a TIFF of GDAL."""
    try:
        return float(str(_tag(image, _GDAL_NODATA)).strip("\0 "))
    except ValueError:
        return None


def _scale(values: NDArray[Any], nodata: float | None) -> NDArray[np.uint8]:
    """Scale the values of an image to 0..255; an image of one value becomes mid-grey."""
    low, high = _black_and_white(values, nodata)
    if low == high:
        return np.full(values.shape, 128, np.uint8)
    scaled = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _BLOCK_ROWS):
        block = values[start : start + _BLOCK_ROWS].astype(np.float64)  # the whole image may not fit into memory so
        if values.dtype.kind == "f":
            np.nan_to_num(block, copy=False, nan=low, posinf=high, neginf=low)
        np.clip(block, low, high, out=block)
        block -= low
        block *= 255 / (high - low)
        scaled[start : start + _BLOCK_ROWS] = np.rint(block, out=block)
    return scaled


def _black_and_white(values: NDArray[Any], nodata: float | None) -> tuple[float, float]:
    """Return the values that become 0 and 255."""
    known = values.ravel()
    if known.dtype.kind == "f":
        known = known[np.isfinite(known)]
    if nodata is not None:
        known = known[known != np.float64(nodata).astype(known.dtype)] if np.isfinite(nodata) else known
    if not known.size:
        raise UnsupportedPixelsError("no pixel has a finite value; expected a range of values. Remove the image")
    cut = int(CUT_FRACTION * known.size)
    ordered = np.partition(known, (cut, known.size - 1 - cut))
    low, high = float(ordered[cut]), float(ordered[-1 - cut])
    return (low, high) if low < high else (float(known.min()), float(known.max()))
