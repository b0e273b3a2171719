"""Reads one sample from its shard: a picture and its record."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from dataclasses import dataclass, replace

from PIL import Image

from cogvlm_ft.data.index import ShardIndex
from cogvlm_ft.data.record import BadSampleError, Record, box_defect, clip_box, record_from_json
from cogvlm_ft.grounding.targets import Target

MAX_PIXELS = 100_000_000
"""Largest picture that is decoded: 100 megapixels are 300 MB in memory."""

_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # Pillow knows formats that start other programs
_MAX_OPEN_FILES = 64  # per process; the usual limit is 1024


@dataclass(frozen=True)
class Sample:
    """image: RGB, as stored (an EXIF rotation is not applied), `record.image_size_px` large."""

    record: Record
    image: Image.Image


class ShardReader:
    """Random access to the samples of an index.

    May be built before a DataLoader starts its workers: every process opens its own files. Not for several threads.
    """

    def __init__(self, index: ShardIndex, *, max_pixels: int = MAX_PIXELS) -> None:
        self.index = index
        self.max_pixels = max_pixels
        self._pid = os.getpid()
        self._files: OrderedDict[int, int] = OrderedDict()  # shard number -> file descriptor, last used last

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: int) -> Sample:
        """Sample i of the index. Raises BadSampleError, whatever is wrong with the bytes."""
        index = self.index
        key = index.key(i)
        shard = int(index.shard_number[i])
        json_bytes = self._read_bytes(key, shard, int(index.json_offset[i]), int(index.json_size[i]))
        record = record_from_json(json_bytes, key)
        image_bytes = self._read_bytes(key, shard, int(index.image_offset[i]), int(index.image_size[i]))
        image = decode_image(image_bytes, key, self.max_pixels)
        return Sample(_fit_record(record, image.size), image)

    def _read_bytes(self, key: str, shard: int, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._file(shard), size, offset)
        except OSError as error:
            raise BadSampleError(key, "unreadable_shard", f"{self.index.shard_paths[shard]}: {error}") from None
        if len(data) != size:
            where = f"{self.index.shard_paths[shard]}, byte {offset}"
            raise BadSampleError(key, "short_read", f"{where}: {len(data)} of {size} bytes")
        return data

    def _file(self, shard: int) -> int:
        if self._pid != os.getpid():  # forked or unpickled: the numbers belong to another process
            self._pid = os.getpid()
            self._files.clear()
        if shard not in self._files:
            if len(self._files) >= _MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.index.shard_paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        self._files.move_to_end(shard)
        return self._files[shard]


def decode_image(data: bytes, key: str, max_pixels: int) -> Image.Image:
    """The whole picture as RGB. Raises BadSampleError with reason too_many_pixels or broken_image."""
    Image.MAX_IMAGE_PIXELS = None  # ours replaces Pillow's limit, which only warns up to twice its value
    try:
        with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
            width, height = image.size
            if width * height <= max_pixels:
                return image.convert("RGB")
    except Exception as error:  # on broken bytes Pillow's decoders raise nearly anything: KeyError, struct.error
        raise BadSampleError(key, "broken_image", f"{type(error).__name__}: {error}") from None
    raise BadSampleError(key, "too_many_pixels", f"{width} x {height} pixels, the limit is {max_pixels}")


def _fit_record(record: Record, image_size_px: tuple[int, int]) -> Record:
    """Checks the record against its picture, and clips boxes that leave it by a rounding error."""
    if record.image_size_px not in (None, image_size_px):
        detail = f"the record says {record.image_size_px}, the image has {image_size_px}"
        raise BadSampleError(record.key, "size_mismatch", detail)
    targets = tuple(_fit_target(target, record.key, image_size_px) for target in record.targets)
    return replace(record, image_size_px=image_size_px, targets=targets)


def _fit_target(target: Target, key: str, image_size_px: tuple[int, int]) -> Target:
    for box in target.boxes_xyxy:
        defect = box_defect(box, image_size_px)
        if defect:
            raise BadSampleError(key, defect, f"box {box} of {target.phrase!r} in an image of {image_size_px}")
    return replace(target, boxes_xyxy=tuple(clip_box(box, image_size_px) for box in target.boxes_xyxy))
