"""Find photos that look alike in two splits: frames of one video, resized or brightened copies.

The perceptual hash of `imagehash` describes the coarse pattern of brightness in 64 bits. Two photos are near-duplicates
if few bits differ; identical files are found by their bytes instead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import NamedTuple

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cogvlm_ft.data.pixels import open_image
from cogvlm_ft.data.reader import MAX_PIXELS

_MAX_BITS = 6
"""Maximum number of different bits, out of 64: unrelated photos differ in about 32."""
_MIN_CONTRAST = 8
"""Minimum difference in grey levels between the darkest and the brightest part: the hash of a plain photo is noise."""
_SIDE = 128


class HashedPhoto(NamedTuple):
    """A photo by its number in the review, its split and `photo_hash`."""

    number: int
    split: str
    hash: int


class NearDuplicate(NamedTuple):
    """Two photos in different splits, and how many of the 64 bits differ."""

    first: HashedPhoto
    second: HashedPhoto
    num_bits: int


def photo_hash(data: bytes) -> int | None:
    """Return the perceptual hash of the bytes of an image; None if it cannot be read or is plain."""
    try:
        with open_image(data) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            image.draft("L", (_SIDE, _SIDE))
            grey = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    levels = np.cumsum(grey.histogram())
    low, high = np.searchsorted(levels, (0.01 * levels[-1], 0.99 * levels[-1]))
    if high - low < _MIN_CONTRAST:
        return None
    bits = imagehash.phash(grey).hash.flatten()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def near_duplicates(photos: Iterable[HashedPhoto], max_bits: int = _MAX_BITS) -> Iterator[NearDuplicate]:
    """Yield for each photo of the smaller of two splits the closest one of the other, if few enough bits differ.

    Memory: about 100 bytes per photo.
    """
    by_split: dict[str, list[HashedPhoto]] = defaultdict(list)
    for photo in photos:
        by_split[photo.split].append(photo)
    for one, other in combinations(sorted(by_split), 2):
        few, many = sorted((by_split[one], by_split[other]), key=len)
        hashes = np.array([photo.hash for photo in many], dtype=np.uint64)
        for photo in few:
            num_bits = _num_ones(hashes ^ np.uint64(photo.hash))
            closest = int(num_bits.argmin())
            if num_bits[closest] <= max_bits:
                yield NearDuplicate(photo, many[closest], int(num_bits[closest]))


def _num_ones(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Count the bits that are set; NumPy 1 has no function for it."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(values).astype(np.int64)
    octets = values.view(np.uint8).reshape(-1, 8)
    return _ONES[octets].sum(axis=1)


_ONES = np.array([bin(octet).count("1") for octet in range(256)], dtype=np.int64)
