"""Read the rows of a large photo from the top, in little memory: JPEG, PNG and TIFF of 8 bits, by libvips.

A JPEG whose rows are spread over several scans, and an interlaced PNG, exist in memory as a whole before their first
row is known; so does the range of values of more than 8 bits.
"""

from __future__ import annotations

from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cogvlm_ft.data.pixels import PILLOW_FORMATS, UnsupportedPixelsError
from cogvlm_ft.data.reader import orientation_of

MAX_STREAMED_PIXELS = 2_000_000_000
MAX_PIXELS_PER_BYTE = 500
"""Maximum pixels per byte of a file. A photo has about 10; a PNG of one colour has 1000 and can be huge."""
MAX_STREAMED_BYTES = 1 << 34
"""Largest file that is read row by row."""
STREAMED_FORMATS = ("JPEG", "PNG", "TIFF")  # as Pillow names them

_MODES = ("L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr")
_ORIENTATION = 274  # tag of TIFF
_CHUNK = 1 << 24
_START_OF_SCAN = b"\xff\xda"
_INSTALL = "Install it: pip install 'cogvlm-ft[tiles]'"


class LargeHeader(NamedTuple):
    """Of a photo whose rows are streamed. size_px: (width, height) as stored. orientation: by EXIF, 1 to 8."""

    size_px: tuple[int, int]
    orientation: int
    is_jpeg: bool


def read_large_header(file: BinaryIO, num_bytes: int, max_pixels: int) -> LargeHeader | None:
    """Return the header of a photo of more than `max_pixels`; None for others, also for what is not an image.

    num_bytes: of the file. Raises UnsupportedPixelsError if its rows cannot be read in little memory.
    """
    Image.MAX_IMAGE_PIXELS = None  # the limits here are others
    file.seek(0)
    try:
        image = Image.open(file, formats=PILLOW_FORMATS)
        width, height = image.size
        orientation = 1 if image.format == "TIFF" else orientation_of(image)
    except Exception:  # Pillow raises nearly anything; decoding reports it
        return None
    if width * height <= max_pixels:
        return None
    check_streamable(file, image, num_bytes, max_pixels)
    return LargeHeader((width, height), orientation, image.format == "JPEG")


class RowStream(Protocol):
    """The rows of a photo, each read once. size_px: (width, height) as stored."""

    size_px: tuple[int, int]

    def read(self, num_rows: int) -> NDArray[np.uint8]:
        """Return the next rows as RGB, uint8[num_rows, width, 3]."""


class DecodedRows:
    """The rows of an image in memory."""

    def __init__(self, image: Image.Image) -> None:
        self.size_px = image.size
        self._image, self._row = image, 0

    def read(self, num_rows: int) -> NDArray[np.uint8]:
        """Return the next rows."""
        first, self._row = self._row, self._row + num_rows
        return np.asarray(self._image.crop((0, first, self.size_px[0], self._row)))


class StreamedRows:
    """The rows of a file, decoded while they are read."""

    def __init__(self, file: BinaryIO, size_px: tuple[int, int]) -> None:
        """Open the file. Raises UnsupportedPixelsError, or ValueError for one that libvips cannot read."""
        self.size_px = size_px
        self._vips = _load_vips()
        self._row = 0
        file.seek(0)
        try:
            source = self._vips.Source.new_from_descriptor(file.fileno())
            image = self._vips.Image.new_from_source(source, "", access="sequential", fail_on="truncated")
        except self._vips.Error as error:
            raise ValueError(_text_of(error)) from None
        if image.format != "uchar" or image.interpretation not in ("srgb", "b-w") or image.bands > 4:
            found = f"{image.format} {image.interpretation} of {image.bands} bands"
            raise UnsupportedPixelsError(f"{found}; expected 8-bit grey or RGB to read it in parts. Convert the image")
        if (image.width, image.height) != size_px:
            raise ValueError(f"found {image.width} x {image.height} pixels; expected {size_px[0]} x {size_px[1]}")
        self._bands = image.bands
        self._region = self._vips.Region.new(image)

    def read(self, num_rows: int) -> NDArray[np.uint8]:
        """Return the next rows. Raises ValueError if they are damaged."""
        try:
            data = self._region.fetch(0, self._row, self.size_px[0], num_rows)
        except self._vips.Error as error:
            raise ValueError(_text_of(error)) from None
        self._row += num_rows
        rows = np.frombuffer(data, np.uint8).reshape(num_rows, self.size_px[0], self._bands)
        return np.repeat(rows[..., :1], 3, axis=2) if self._bands < 3 else rows[..., :3]


def check_streamable(file: BinaryIO, image: Image.Image, num_bytes: int, max_pixels: int) -> None:
    """Raise UnsupportedPixelsError if the rows of a file cannot be read in little memory. image: opened, not decoded.

    num_bytes: of the file. max_pixels: that are decoded at once, for the message.
    """
    width, height = image.size
    what, instead = f"{width} x {height} pixels", f"at most {max_pixels} pixels decoded at once"
    if width * height > min(MAX_STREAMED_PIXELS, MAX_PIXELS_PER_BYTE * num_bytes):
        limits = f"at most {MAX_STREAMED_PIXELS} pixels and {MAX_PIXELS_PER_BYTE} for each byte"
        raise UnsupportedPixelsError(f"{what} in {num_bytes} bytes; expected {limits}. Cut the photo into smaller ones")
    if image.format not in STREAMED_FORMATS or image.mode not in _MODES:
        kind = f"{image.format} of mode {image.mode}"
        raise UnsupportedPixelsError(f"{what}, {kind}; expected {instead}, or an 8-bit JPEG, PNG or TIFF. Convert it")
    if image.format == "JPEG" and (image.info.get("progressive") or _num_scans(file) > 1):
        raise UnsupportedPixelsError(f"{what}, a progressive JPEG; expected {instead}. Save it as a baseline JPEG")
    if image.format == "PNG" and image.info.get("interlace"):
        raise UnsupportedPixelsError(f"{what}, an interlaced PNG; expected {instead}. Save it without interlacing")
    if image.format == "TIFF" and getattr(image, "tag_v2", {}).get(_ORIENTATION, 1) != 1:
        raise UnsupportedPixelsError(f"{what}, a TIFF with a rotation; expected {instead}. Save it upright")


def _num_scans(file: BinaryIO) -> int:
    file.seek(0)
    count, last = 0, b""
    while data := file.read(_CHUNK):
        count += (last + data).count(_START_OF_SCAN)
        last = data[-1:]
    return count


def _load_vips() -> Any:
    try:
        import pyvips
    except (ImportError, OSError) as error:
        found = f"pyvips cannot be imported ({error}); expected it for photos too large to decode at once"
        raise UnsupportedPixelsError(f"{found}. {_INSTALL}") from None
    pyvips.cache_set_max(0)  # else it keeps what the last photo needed
    return pyvips


def _text_of(error: Any) -> str:
    return " ".join(str(error).split())[:300]
