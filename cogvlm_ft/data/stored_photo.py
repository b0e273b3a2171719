"""A large photo of which tiles are stored, and beside them a smaller image of all of it.

They are one file: an ordinary JPEG of the whole photo, after which the tiles follow as images of their own. Programs
that know nothing of tiles read the first image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from PIL import Image

from cogvlm_ft.data.pixels import open_image, to_rgb
from cogvlm_ft.grounding.tiles import Window

_FIELDS = ("photo", "side_px", "overlap", "whole_px", "windows_xyxy", "num_bytes")


@dataclass(frozen=True)
class StoredTiles:
    """Which tiles of a photo are stored, and where.

    photo: name of the photo they were cut from. side_px, overlap: as for `tile_windows`. whole_px: size of the smaller
    image of all of it. windows_xyxy: of the tiles, in the order of the file. num_bytes: of the smaller image, then of
    each tile.
    """

    photo: str
    side_px: int
    overlap: float
    whole_px: tuple[int, int]
    windows_xyxy: tuple[Window, ...]
    num_bytes: tuple[int, ...]

    def place(self, number: int) -> tuple[int, int]:
        """Return the first byte of a tile in the file, and how many it has; -1 is the smaller image."""
        return sum(self.num_bytes[: number + 1]), self.num_bytes[number + 1]

    def to_json(self) -> dict[str, Any]:
        """Return the fields of a record."""
        return {name: getattr(self, name) for name in _FIELDS}


def stored_tiles_from_json(fields: Any) -> StoredTiles:
    """Parse the fields of a record. Raises ValueError with what is wrong."""
    if not isinstance(fields, Mapping) or not all(name in fields for name in _FIELDS):
        raise ValueError(f"expected an object with {', '.join(_FIELDS)}")
    photo, side_px, overlap = fields["photo"], fields["side_px"], fields["overlap"]
    whole, windows, num_bytes = fields["whole_px"], fields["windows_xyxy"], fields["num_bytes"]
    good = isinstance(photo, str) and isinstance(overlap, (int, float)) and not isinstance(overlap, bool)
    if not good or not _are_positive([side_px]) or not 0 <= overlap < 1:
        raise ValueError("expected a name, a side in pixels and an overlap below 1")
    if not _are_positive(whole) or len(whole) != 2 or not _are_positive(num_bytes):
        raise ValueError("expected [width, height] and numbers of bytes")
    if not isinstance(windows, list) or len(num_bytes) != len(windows) + 1 or not all(map(_is_window, windows)):
        raise ValueError("expected [x0, y0, x1, y1] for each tile, and one number of bytes more than tiles")
    rows = tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in windows)
    return StoredTiles(photo, side_px, float(overlap), (whole[0], whole[1]), rows, tuple(num_bytes))


def _are_positive(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and number > 0 for number in numbers)


def _is_window(value: Any) -> bool:
    are_whole = isinstance(value, list) and len(value) == 4 and all(type(number) is int for number in value)
    return are_whole and 0 <= value[0] < value[2] and 0 <= value[1] < value[3]


class PartReader(Protocol):
    """Reads parts of the file of a stored photo."""

    def read_part(self, start: int, num_bytes: int) -> bytes:
        """Return the bytes from `start` on. Raises BadSampleError."""

    def bad_part(self, detail: str) -> Exception:
        """Return the error for a part that differs from the record."""


@dataclass(frozen=True)
class StoredPhoto:
    """A photo in tiles, decoded where they are shown. size: of the photo, (width, height)."""

    size: tuple[int, int]
    tiles: StoredTiles
    parts: PartReader

    @cached_property
    def whole(self) -> Image.Image:
        """The smaller image of all of it, RGB."""
        return self._decode(-1, self.tiles.whole_px)

    def show(self, window: Window) -> tuple[Image.Image, Window]:
        """Return an image that shows the window at full size if a tile holds all of it, and which part it shows.

        Else all of the photo in its smaller image.
        """
        x0, y0, x1, y1 = window
        x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, self.size[0]), min(y1, self.size[1])
        for number, (left, top, right, bottom) in enumerate(self.tiles.windows_xyxy):
            if left <= x0 and top <= y0 and x1 <= right and y1 <= bottom:
                return self._decode(number, (right - left, bottom - top)), (left, top, right, bottom)
        return self.whole, (0, 0, *self.size)

    def _decode(self, number: int, expected_px: tuple[int, int]) -> Image.Image:
        data = self.parts.read_part(*self.tiles.place(number))
        what = "the whole photo" if number < 0 else f"tile {number}"
        try:
            with open_image(data) as image:
                found = image.size
                if found == expected_px:
                    return to_rgb(image, data)
        except Exception as error:  # Pillow raises nearly anything
            raise self.parts.bad_part(f"{what}: {type(error).__name__}: {error}") from None
        raise self.parts.bad_part(f"{what}: found {found}; expected {expected_px} pixels")


Photo = Image.Image | StoredPhoto
"""An image, or a photo in tiles. `size` is (width, height) of the photo; of an image read in part, that of the part."""


def whole_image(photo: Photo) -> Image.Image:
    """Return an image of all of the photo, smaller than it if it is in tiles."""
    return photo.whole if isinstance(photo, StoredPhoto) else photo
