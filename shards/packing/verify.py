"""Verify that an image file is complete, and return its size: by its structure, as fast as copying, or by decoding.

The structure shows truncated and empty files, other kinds of file, trailing zeros, and for PNG any changed byte outside
its texts. Neither way detects changed bytes in the image data of a JPEG reliably: its decoder conceals them.
"""

from __future__ import annotations

from typing import NamedTuple

from cogvlm_ft.data.pixels import open_image
from cogvlm_ft.data.reader import bad_image, decode_image, orientation_of, read_orientation
from cogvlm_ft.data.record import BadSampleError

VERIFY = ("structure", "decode")

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, b"\xff\xd9"


class WholeImage(NamedTuple):
    """size_px: (width, height) as stored. orientation: of its EXIF data, 1 to 8; 1 is upright."""

    size_px: tuple[int, int]
    orientation: int


def verify_image(data: bytes, key: str, max_pixels: int, verify: str = VERIFY[0]) -> WholeImage:
    """Verify the image; raises BadSampleError as `decode_image` does.

    Other kinds than JPEG and PNG are always decoded.
    """
    if verify == "decode" or not data.startswith((_JPEG, _PNG)):
        return WholeImage(decode_image(data, key, max_pixels).size, read_orientation(data))
    try:
        with open_image(data, ("JPEG", "PNG")) as image:
            width, height = image.size
            if width * height <= max_pixels:
                orientation = orientation_of(image)
                if data.startswith(_PNG):
                    image.verify()  # the checksum of every chunk, up to the last
                elif data.rfind(_END_OF_IMAGE, _first_scan(data)) < 0:
                    raise ValueError("the file ends before the image does")
                return WholeImage((width, height), orientation)
    except Exception as error:
        raise bad_image(key, data, error) from None
    raise BadSampleError(key, "too_many_pixels", f"{width} x {height} pixels; expected at most {max_pixels}")


def _first_scan(data: bytes) -> int:
    """Return where the image data of a JPEG begins; before that, a thumbnail may have an end of image of its own.

    Behind it, the two bytes of an end of image mean nothing else. Raises ValueError or IndexError if there are none.
    """
    position = 2
    while True:
        if data[position] != 0xFF:
            raise ValueError(f"no marker at byte {position}")
        while data[position] == 0xFF:  # any number of fill bytes
            position += 1
        marker = data[position]
        if marker == _START_OF_SCAN:
            return position
        position += 1 + int.from_bytes(data[position + 1 : position + 3], "big")
