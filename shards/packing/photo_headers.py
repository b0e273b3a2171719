"""Read the size and the EXIF orientation of the first photos of a source, from the beginning of each file, once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from cogvlm_ft.data.pixels import PILLOW_FORMATS, open_image
from cogvlm_ft.data.reader import orientation_of
from cogvlm_ft.shards.packing.candidates import Candidate, Problem, Rejected
from cogvlm_ft.shards.packing.checks import open_large, read_image
from cogvlm_ft.shards.packing.files import prefetch

MAX_PHOTOS = 1000
"""Number of photos that are inspected for each decision about a source."""

_NUM_FIRST = 2**16  # bytes; the size of nearly every JPEG is in them
_NUM_AHEAD = 64
_JPEG = b"\xff\xd8\xff"
_WITH_ORIENTATION = ("JPEG", "MPO", "PNG", "WEBP", "AVIF")
"""Formats with an orientation, as Pillow names them. Pillow itself rotates a TIFF."""


class PhotoHeader(NamedTuple):
    """size_px: (width, height) as stored; None if it is not an image. orientation: by EXIF, 1 to 8; 1 is upright."""

    size_px: tuple[int, int] | None
    orientation: int = 1


class PhotoHeaders:
    """The headers of the photos below a folder. It keeps those that were read, so read only the first ones of a source.

    What cannot be read is reported when its sample is made.
    """

    def __init__(self, images: Path) -> None:
        self._images = images
        self._known: dict[tuple[str, Path | None], PhotoHeader | None] = {}

    def read(self, candidate: Candidate) -> PhotoHeader | None:
        """Return the header of the photo of a candidate; None if the file cannot be read."""
        name = candidate.image, candidate.embedded_in
        if name not in self._known:
            self._known[name] = self._read(candidate)
        return self._known[name]

    def ahead(self, parts: Iterable[Candidate | Problem]) -> Iterator[Candidate | Problem]:
        """Yield the same parts while the disk reads the headers of the next MAX_PHOTOS photos."""
        waiting: deque[Candidate | Problem] = deque()
        num_asked = 0
        for part in parts:
            if num_asked < MAX_PHOTOS and isinstance(part, Candidate):
                prefetch(self._images, part.image, num_first=_NUM_FIRST)
                num_asked += 1
            waiting.append(part)
            if len(waiting) > _NUM_AHEAD:
                yield waiting.popleft()
        yield from waiting

    def _read(self, candidate: Candidate) -> PhotoHeader | None:
        try:
            _, first = read_image(candidate, self._images, num_first=_NUM_FIRST)
            is_enough = first.startswith(_JPEG) or len(first) < _NUM_FIRST
            header = _parse(first) if is_enough else self._parse_file(candidate)
            return header or _parse(read_image(candidate, self._images)[1]) or PhotoHeader(None)
        except Rejected:
            return None

    def _parse_file(self, candidate: Candidate) -> PhotoHeader | None:
        """Parse a file without reading all of it, which may be larger than memory allows."""
        with suppress(Rejected), open_large(candidate, self._images) as (file, _):
            return _parse(file)
        return None


def _parse(data: bytes | FileIO) -> PhotoHeader | None:
    try:
        with open_image(data) if isinstance(data, bytes) else Image.open(data, formats=PILLOW_FORMATS) as image:
            orientation = orientation_of(image) if image.format in _WITH_ORIENTATION else 1
            return PhotoHeader(image.size, orientation)
    except Exception:  # not an image, or not enough of it; Pillow raises anything
        return None
