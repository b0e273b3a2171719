"""Cut a photo into tiles and a smaller image of all of it, in one pass over its rows."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cogvlm_ft.data.reader import TURN_UPRIGHT, upright_size
from cogvlm_ft.data.row_streams import RowStream
from cogvlm_ft.data.stored_photo import StoredTiles
from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.tiles import Window, tile_windows

WHOLE_SIDE_PX = 1960
"""Longer side of the reduced whole image: twice the largest resolution of published models."""
QUALITY = 95
"""JPEG quality of tiles cut from JPEG photos, without colour subsampling."""
MIN_SIDE_PX, MAX_OVERLAP = 16, 0.9
"""The same limits as for `data.tiles`."""
MAX_SIDE_PX = 10_000
"""Maximum side of a tile and of the reduced whole image; each is decoded as a whole."""
MAX_BAND_BYTES = 2**28
"""Maximum memory for the image rows that one row of tiles needs."""

_BLOCK_ROWS = 64
_BACK = {6: 8, 8: 6}  # what turns an upright image to how it is stored; the others undo themselves


@dataclass(frozen=True)
class TileCut:
    """How photos are cut. quality: of JPEG tiles; None: QUALITY for JPEG photos, lossless PNG for others."""

    side_px: int
    overlap: float
    quality: int | None = None
    whole_side_px: int = WHOLE_SIDE_PX

    def __post_init__(self) -> None:
        """Raise DataError for a value that cannot be used."""
        if not MIN_SIDE_PX <= self.side_px <= MAX_SIDE_PX:
            raise DataError(f"--tiles: {self.side_px}; expected {MIN_SIDE_PX} to {MAX_SIDE_PX} px")
        if self.whole_side_px > MAX_SIDE_PX:
            raise DataError(f"--max-side: {self.whole_side_px}; expected at most {MAX_SIDE_PX} px with --tiles")
        if not 0 <= self.overlap <= MAX_OVERLAP:
            raise DataError(f"--overlap: {self.overlap}; expected 0 to {MAX_OVERLAP}")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise DataError(f"--tile-quality: {self.quality}; expected 1 to 100")

    def windows(self, size_px: tuple[int, int]) -> list[Window]:
        """Return the tiles of an upright photo; the photo itself is the only one if it is not larger."""
        return tile_windows(size_px, self.side_px, self.overlap)


@dataclass(frozen=True)
class CutPhoto:
    """whole: the encoded smaller image. The tiles follow it in the file of tiles."""

    whole: bytes
    tiles: StoredTiles


def cut_photo(
    rows: RowStream, cut: TileCut, out: IO[bytes], *, photo: str, is_jpeg: bool, orientation: int
) -> CutPhoto:
    """Write the tiles of a photo one after another; return its smaller image, and where each tile is.

    photo: its name, for the record. orientation: by EXIF; tiles and whole are upright. Raises ValueError for damaged
    rows, and for tiles that are too wide to be cut in little memory.
    """
    size_px = upright_size(rows.size_px, orientation)
    needed = rows.size_px[0] * cut.side_px * 3
    if needed > MAX_BAND_BYTES:
        most = MAX_BAND_BYTES // (3 * rows.size_px[0])
        raise ValueError(f"tiles of {cut.side_px} px of a photo {rows.size_px[0]} px wide; expected at most {most} px")
    quality = cut.quality or (QUALITY if is_jpeg else None)
    stored = {
        _turn_window(window, size_px, _BACK.get(orientation, orientation)): window for window in cut.windows(size_px)
    }
    smaller = _Smaller(rows.size_px, cut.whole_side_px)
    windows, num_bytes = [], []
    for window, pixels in _crops(rows, list(stored), smaller):
        data = _encode(_turned(Image.fromarray(pixels), orientation), quality)
        out.write(data)
        windows.append(stored[window])
        num_bytes.append(len(data))
    whole = _turned(smaller.image(), orientation)
    encoded = _encode(whole, QUALITY)
    tiles = StoredTiles(photo, cut.side_px, cut.overlap, whole.size, tuple(windows), (len(encoded), *num_bytes))
    return CutPhoto(encoded, tiles)


def _crops(rows: RowStream, windows: list[Window], smaller: _Smaller) -> Iterator[tuple[Window, NDArray[np.uint8]]]:
    """Yield the pixels of every window, from the top; `smaller` gets every row."""
    width = rows.size_px[0]
    kept, first = np.zeros((0, width, 3), np.uint8), 0
    for top, bottom in sorted({(window[1], window[3]) for window in windows}):
        left = max(0, first + len(kept) - top)
        band = kept if len(kept) == bottom - top else np.empty((bottom - top, width, 3), np.uint8)
        band[:left] = kept[len(kept) - left :]
        for start in range(left, bottom - top, _BLOCK_ROWS):
            block = rows.read(min(_BLOCK_ROWS, bottom - top - start))
            band[start : start + len(block)] = block
            smaller.add(block)
        kept, first = band, top
        for window in windows:
            if (window[1], window[3]) == (top, bottom):
                yield window, np.ascontiguousarray(band[:, window[0] : window[2]])


class _Smaller:
    """Shrinks a photo while its rows are read: by a whole factor to at least twice the side, then by Lanczos."""

    def __init__(self, size_px: tuple[int, int], side_px: int) -> None:
        width, height = size_px
        self._factor = max(1, max(size_px) // (2 * side_px))
        scale = min(1.0, side_px / max(size_px))
        self._size = max(1, round(width * scale)), max(1, round(height * scale))
        self._rows = np.zeros((0, width, 3), np.uint8)
        self._reduced = Image.new("RGB", (-(-width // self._factor), -(-height // self._factor)))
        self._num_rows = 0
        self._exact = width / self._factor, height / self._factor

    def add(self, block: NDArray[np.uint8]) -> None:
        """Add the next rows."""
        rows = np.concatenate([self._rows, block])
        usable = len(rows) // self._factor * self._factor
        self._rows = rows[usable:]
        self._paste(rows[:usable])

    def image(self) -> Image.Image:
        """Return the smaller image, after the last row."""
        self._paste(self._rows)
        return self._reduced.resize(self._size, Image.Resampling.LANCZOS, box=(0, 0, *self._exact))

    def _paste(self, rows: NDArray[np.uint8]) -> None:
        if len(rows):
            reduced = Image.fromarray(np.ascontiguousarray(rows)).reduce(self._factor)
            self._reduced.paste(reduced, (0, self._num_rows))
            self._num_rows += reduced.height


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image if orientation == 1 else image.transpose(TURN_UPRIGHT[orientation])


def _turn_window(window: Window, size_px: tuple[int, int], orientation: int) -> Window:
    """Return where a window of an image of `size_px` is after turning the image by an EXIF orientation."""
    x0, y0, x1, y1 = window
    width, height = size_px
    if orientation in (2, 3, 7, 8):
        x0, x1 = width - x1, width - x0
    if orientation in (3, 4, 6, 7):
        y0, y1 = height - y1, height - y0
    return (y0, x0, y1, x1) if orientation >= 5 else (x0, y0, x1, y1)


def _encode(image: Image.Image, quality: int | None) -> bytes:
    buffer = io.BytesIO()
    if quality is None:
        image.save(buffer, "PNG", compress_level=4)
    else:
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
