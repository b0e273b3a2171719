"""Load a photo; one too large to decode at once is cut into tiles, once."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cogvlm_ft.data.cutting import TileCut, cut_photo
from cogvlm_ft.data.pixels import UnsupportedPixelsError
from cogvlm_ft.data.reader import MAX_PIXELS, decode_image, upright_size
from cogvlm_ft.data.record import BadSampleError
from cogvlm_ft.data.row_streams import MAX_STREAMED_BYTES, StreamedRows, read_large_header
from cogvlm_ft.data.stored_photo import Photo, StoredPhoto
from cogvlm_ft.plain_files import open_regular
from cogvlm_ft.tile_settings import TilesConfig

MAX_FILE_BYTES = 500_000_000


@dataclass(frozen=True)
class _TileFile:
    """A temporary file of tiles; it is deleted when it is no longer used."""

    name: str
    first: bytes
    file: IO[bytes]

    def read_part(self, start: int, num_bytes: int) -> bytes:
        """Read a tile, or the smaller image, which is in memory."""
        if start < len(self.first):
            return self.first[start : start + num_bytes]
        self.file.seek(start - len(self.first))
        return self.file.read(num_bytes)

    def bad_part(self, detail: str) -> BadSampleError:
        return BadSampleError(self.name, "broken_image", detail)


def load_photo(path: Path, *, upright: bool, tiles: TilesConfig) -> Photo:
    """Load a photo; one above MAX_PIXELS in tiles, if there are any. Raises DataError, whatever is wrong with it."""
    try:
        if not path.is_file():  # a device or a pipe may never end
            raise BadSampleError(path.name, "no_such_file", str(path))
        large = _cut_large(path, upright, tiles) if tiles.side_px is not None else None
        if large is not None:
            return large
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BadSampleError(path.name, "too_large", f"more than {MAX_FILE_BYTES} bytes")
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # a name may hold characters that file names cannot
        raise BadSampleError(path.name, "unreadable_file", str(error)) from None
    try:
        return decode_image(data, path.name, MAX_PIXELS, upright=upright)
    except BadSampleError as error:
        if error.reason != "too_many_pixels":
            raise
        hint = "Ask with --tiles, which reads it in parts"
        raise BadSampleError(path.name, error.reason, f"{error.detail}. {hint}") from None


def _cut_large(path: Path, upright: bool, tiles: TilesConfig) -> StoredPhoto | None:
    with open_regular(path) as file:
        num_bytes = path.stat().st_size
        try:
            header = read_large_header(file, num_bytes, MAX_PIXELS)
            if header is None:
                return None
            if num_bytes > MAX_STREAMED_BYTES:
                raise BadSampleError(path.name, "too_large", f"more than {MAX_STREAMED_BYTES} bytes")
            assert tiles.side_px is not None
            out = tempfile.TemporaryFile()  # noqa: SIM115  closed with the photo
            cut = TileCut(tiles.side_px, tiles.overlap)
            rows, orientation = StreamedRows(file, header.size_px), header.orientation if upright else 1
            found = cut_photo(rows, cut, out, photo=path.name, is_jpeg=header.is_jpeg, orientation=orientation)
        except UnsupportedPixelsError as error:
            raise BadSampleError(path.name, "too_many_pixels", str(error)) from None
        except ValueError as error:
            raise BadSampleError(path.name, "broken_image", str(error)) from None
    size_px = upright_size(header.size_px, orientation)
    return StoredPhoto(size_px, found.tiles, _TileFile(path.name, found.whole, out))
