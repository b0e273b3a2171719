"""Read one sample from its shard: an image and its record."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from cogvlm_ft.data.index import ShardIndex, load_index
from cogvlm_ft.data.patience import set_retry_s
from cogvlm_ft.data.pixels import PILLOW_FORMATS, UnsupportedPixelsError, kind_of, open_image, to_rgb
from cogvlm_ft.data.record import BadSampleError, Record, box_defect, clip_box, record_from_json
from cogvlm_ft.data.remote import RemoteShard
from cogvlm_ft.data.shard_sets import SplitChoice
from cogvlm_ft.data.stored_photo import Photo, StoredPhoto, StoredTiles
from cogvlm_ft.data.versions import check_indexed
from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Target
from cogvlm_ft.settings import Config

MAX_PIXELS = 100_000_000
"""Largest image that is decoded: 100 megapixels are 300 MB in memory."""

ORIENTATION_TAG = 0x0112  # EXIF
TURN_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

known_indexes: dict[str, ShardIndex] = {}
"""Indexes that `open_split` need not read again, by `source_of_split`: `data/node_indexes.py` adds and removes them."""

_MAX_OPEN_FILES = 64  # per process; the usual limit is 1024


@dataclass(frozen=True)
class Sample:
    """A record and its image.

    image: RGB, upright by its EXIF orientation if `record.upright`, of `record.image_size_px`; or exactly a half, a
    quarter or an eighth of that size if the reader drafts; or a photo in tiles.
    """

    record: Record
    image: Photo


@dataclass(frozen=True)
class _Member:
    """An image in a shard, of which parts are read."""

    reader: ShardReader
    key: str
    shard: int
    offset: int

    def read_part(self, start: int, num_bytes: int) -> bytes:
        return self.reader._read_bytes(self.key, self.shard, self.offset + start, num_bytes)

    def bad_part(self, detail: str) -> BadSampleError:
        return BadSampleError(self.key, "broken_image", detail)


class ShardReader:
    """Random access to the samples of an index.

    draft_side: JPEGs are decoded at a half, a quarter or an eighth of their size if both sides keep this many pixels
        and are divisible by the factor; None: always in full.

    May be built before a DataLoader starts its workers: every process opens its own files. Not thread-safe.
    """

    def __init__(self, index: ShardIndex, *, max_pixels: int = MAX_PIXELS, draft_side: int | None = None) -> None:
        self.index = index
        self.max_pixels = max_pixels
        self.draft_side = draft_side
        self._pid = os.getpid()
        self._files: OrderedDict[int, int] = OrderedDict()  # shard number -> file descriptor, last used last

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: int) -> Sample:
        """Return sample i of the index. Raises BadSampleError for any defect in its bytes."""
        index = self.index
        key = index.key(i)
        shard = int(index.shard_number[i])
        record = self.read_record(i)
        if record.tiles is not None:
            return self._read_stored(i, record, record.tiles)
        image_bytes = self._read_bytes(key, shard, int(index.image_offset[i]), int(index.image_num_bytes[i]))
        image, shrink = _decode(image_bytes, key, self.max_pixels, record.upright, self.draft_side)
        return Sample(_fit_record(record, (image.width * shrink, image.height * shrink)), image)

    def _read_stored(self, i: int, record: Record, tiles: StoredTiles) -> Sample:
        """Return a photo in tiles, which are decoded when they are shown."""
        key, num_bytes, size_px = record.key, int(self.index.image_num_bytes[i]), record.image_size_px
        if sum(tiles.num_bytes) != num_bytes or size_px is None:
            detail = f"tiles: found {sum(tiles.num_bytes)} bytes of a photo of {size_px}; expected {num_bytes} bytes"
            raise BadSampleError(key, "size_mismatch", detail)
        most = max((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in ((0, 0, *tiles.whole_px), *tiles.windows_xyxy))
        if most > self.max_pixels:
            raise BadSampleError(key, "too_many_pixels", f"a tile of {most} pixels; expected at most {self.max_pixels}")
        member = _Member(self, key, int(self.index.shard_number[i]), int(self.index.image_offset[i]))
        return Sample(_fit_record(record, size_px), StoredPhoto(size_px, tiles, member))

    def read_record(self, i: int) -> Record:
        """Return the record of sample i, not checked against the image. Raises BadSampleError."""
        index = self.index
        key, shard = index.key(i), int(index.shard_number[i])
        data = self._read_bytes(key, shard, int(index.json_offset[i]), int(index.json_num_bytes[i]))
        return record_from_json(data, key)

    def read_size(self, i: int, record: Record) -> tuple[int, int]:
        """Return (width, height) of the image of sample i, from its record or else from the header of its file.

        Raises BadSampleError.
        """
        if record.image_size_px is not None:
            return record.image_size_px
        index, key = self.index, self.index.key(i)
        place = int(index.image_offset[i]), int(index.image_num_bytes[i])
        data = self._read_bytes(key, int(index.shard_number[i]), *place)
        try:
            with open_image(data) as image:
                return upright_size(image.size, orientation_of(image) if record.upright else 1)
        except Exception as error:
            raise bad_image(key, data, error) from None

    def _read_bytes(self, key: str, shard: int, offset: int, size: int) -> bytes:
        path = self.index.shard_paths[shard]
        try:
            if isinstance(path, RemoteShard):
                return path.read(size, offset)
            data = os.pread(self._file(shard, path), size, offset)
        except OSError as error:
            raise BadSampleError(key, "unreadable_shard", f"{path}: {error}") from None
        if len(data) != size:
            raise BadSampleError(key, "short_read", f"{path}, byte {offset}: {len(data)} of {size} bytes")
        return data

    def close(self) -> None:
        """Close the files that this process has opened; the next read opens them again."""
        if self._pid == os.getpid():
            for file in self._files.values():
                os.close(file)
        self._files.clear()

    def _file(self, shard: int, path: Path) -> int:
        if self._pid != os.getpid():  # forked or unpickled: the descriptors belong to another process
            self._pid = os.getpid()
            self._files.clear()
        if shard not in self._files:
            if len(self._files) >= _MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = _open_indexed(path)
        self._files.move_to_end(shard)
        return self._files[shard]


def _open_indexed(path: Path) -> int:
    """Return a file descriptor. Raises DataError if the tar was replaced."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        check_indexed(path, os.fstat(file))
    except DataError:
        os.close(file)
        raise
    return file


def open_split(config: Config, split: str, *, draft_side: int | None = None) -> ShardReader:
    """Open one split, such as `config.data.val_split`; DataError if it is missing or unreadable.

    It is read from `data.val_shards` if it is the validation split and that is set, else from `data.shards`.
    """
    set_retry_s(config.data.retry_s)
    index = known_indexes.get(source_of_split(config, split)) or read_index(config, split)
    return ShardReader(index, draft_side=draft_side)


def read_index(config: Config, split: str) -> ShardIndex:
    """Index the tars of a split, as `open_split` does."""
    data = config.data
    is_separate = _is_separate(config, split)
    choice = SplitChoice(
        setting="data.val_shards" if is_separate else "data.shards",
        by_name_only=not is_separate and split != data.train_split,
        takes_only_split=is_separate,
        runs_commands=True,  # load_config refuses those that are not typed on the command line
    )
    shards = data.val_shards if is_separate else data.shards
    return load_index(shards, split, cache_dir=data.cache_dir, cache_gib=data.cache_gib, choice=choice)


def source_of_split(config: Config, split: str) -> str:
    """Return a text of all settings on which the index of a split depends."""
    data = config.data
    return repr((split, data.train_split, data.val_split, data.shards, data.val_shards, data.cache_dir, data.cache_gib))


def _is_separate(config: Config, split: str) -> bool:
    return split == config.data.val_split and config.data.val_shards is not None


def decode_image(data: bytes, key: str, max_pixels: int, *, upright: bool = False) -> Image.Image:
    """Decode the whole image as RGB, by the rule of `data.pixels`.

    Raises BadSampleError with reason too_many_pixels, broken_image or unsupported_pixels.

    upright: apply its EXIF orientation.
    """
    return _decode(data, key, max_pixels, upright, None)[0]


def bad_image(key: str, data: bytes, error: Exception) -> BadSampleError:
    """Wrap what Pillow raises on broken bytes, which is nearly any exception: KeyError, struct.error, ..."""
    if isinstance(error, UnsupportedPixelsError):
        return BadSampleError(key, "unsupported_pixels", str(error))
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, UnidentifiedImageError):  # its text has a memory address, which differs between runs
        kind = kind_of(data)
        formats = f"expected one of {', '.join(PILLOW_FORMATS)}"
        what = f"found {kind}; {formats}. Convert the image" if kind else f"unknown format; {formats}"
    return BadSampleError(key, "broken_image", what)


def read_orientation(data: bytes) -> int:
    """Return the EXIF orientation of an encoded image, 1 to 8, without decoding it; 1 (upright) if it is broken.

    Pillow itself turns a TIFF, so this returns 1 for it.
    """
    try:
        with open_image(data, ("JPEG", "PNG", "WEBP", "AVIF")) as image:
            return orientation_of(image)
    except Exception:  # not an image at all: decoding reports it
        return 1


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened image of a format that may have one."""
    if image.format != "WEBP" and "exif" not in image.info:
        return 1  # getexif would decode a PNG to search after the pixels
    return _orientation(image)


def upright_size(size_px: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return (width, height) of an image of `size_px` after applying its EXIF orientation."""
    return (size_px[1], size_px[0]) if orientation >= 5 else size_px


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # on broken EXIF data Pillow raises nearly anything; no viewer turns such an image
        return 1
    return orientation if orientation in TURN_UPRIGHT else 1


def _decode(data: bytes, key: str, max_pixels: int, upright: bool, draft_side: int | None) -> tuple[Image.Image, int]:
    """Return the decoded image and the factor by which its sides are smaller than those of the file."""
    try:
        with open_image(data) as image:
            width, height = image.size
            if width * height <= max_pixels:
                orientation = orientation_of(image) if upright else 1  # before decoding, as when shards are built
                shrink = _draft(image, draft_side) if draft_side else 1
                rgb = to_rgb(image, data)
                return (rgb if orientation == 1 else rgb.transpose(TURN_UPRIGHT[orientation])), shrink
    except Exception as error:
        raise bad_image(key, data, error) from None
    raise BadSampleError(key, "too_many_pixels", f"{width} x {height} pixels; expected at most {max_pixels}")


def _draft(image: Image.Image, side: int) -> int:
    """Let Pillow decode a JPEG at a reduced size; return the factor."""
    width, height = image.size
    for shrink in (8, 4, 2):
        if not width % shrink and not height % shrink and min(width, height) >= side * shrink:
            image.draft(None, (width // shrink, height // shrink))  # no effect on other formats
            break
    return width // image.width


def _fit_record(record: Record, image_size_px: tuple[int, int]) -> Record:
    """Check the record against its image, and clip boxes that exceed it by a rounding error."""
    if record.image_size_px is None:
        _refuse_fractions(record, image_size_px)
    elif record.image_size_px != image_size_px:
        detail = f"image_size_px: found {record.image_size_px}; expected {image_size_px}, the size of the image"
        raise BadSampleError(record.key, "size_mismatch", detail)
    targets = tuple(_fit_target(target, record.key, image_size_px) for target in record.targets)
    return replace(record, image_size_px=image_size_px, targets=targets)


def _refuse_fractions(record: Record, image_size_px: tuple[int, int]) -> None:
    """Refuse boxes of another program that are all within one pixel: they are fractions of the sides."""
    boxes = [box for target in record.targets for box in target.boxes_xyxy]
    if boxes and min(image_size_px) > 1 and max(max(box) for box in boxes) <= 1:
        detail = f"boxes: found {list(boxes[0])}; expected pixels of an image of {image_size_px}, not fractions of it"
        raise BadSampleError(record.key, "box_in_fractions", detail)


def _fit_target(target: Target, key: str, image_size_px: tuple[int, int]) -> Target:
    for box in target.boxes_xyxy:
        defect = box_defect(box, image_size_px)
        if defect:
            raise BadSampleError(key, defect, f"box {box} of {target.phrase!r} in an image of {image_size_px}")
    return replace(target, boxes_xyxy=tuple(clip_box(box, image_size_px) for box in target.boxes_xyxy))
