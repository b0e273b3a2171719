"""Describe the image of a candidate without decoding it, including the orientation in which its boxes were drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256
from io import BytesIO
from typing import NamedTuple

from cogvlm_ft.data.pixels import UnsupportedPixelsError
from cogvlm_ft.data.reader import MAX_PIXELS, upright_size
from cogvlm_ft.data.record import BadSampleError
from cogvlm_ft.data.row_streams import read_large_header
from cogvlm_ft.shards.packing.candidates import Candidate, Problem, Rejected
from cogvlm_ft.shards.packing.checks import with_hint
from cogvlm_ft.shards.packing.verify import WholeImage, verify_image
from cogvlm_ft.shards.reviewing.near_duplicates import photo_hash
from cogvlm_ft.shards.reviewing.readings import boxes_of, fit
from cogvlm_ft.shards.reviewing.sources import Item, Place, read_photo
from cogvlm_ft.shards.reviewing.suspect_texts import Texts


@dataclass(frozen=True)
class Photo:
    """stored_px: (width, height) of the file. orientation: by EXIF, 1 to 8.

    upright: its boxes were drawn on the rotated image. evidence: the reason, if it was not stated.
    look: `photo_hash`. problem: of a photo that only a build with tiles takes.
    """

    stored_px: tuple[int, int]
    sha256: bytes
    orientation: int = 1
    upright: bool = False
    evidence: Texts | None = None
    look: int | None = None
    problem: Problem | None = None

    @property
    def upright_px(self) -> tuple[int, int]:
        """Return the size that a viewer shows."""
        return upright_size(self.stored_px, self.orientation)

    @property
    def size_px(self) -> tuple[int, int]:
        """Return the size that its boxes were drawn for."""
        return self.upright_px if self.upright else self.stored_px


class PhotoFile(NamedTuple):
    """Facts read from the bytes of a photo. sha256 and look: as of `Photo`. too_large: why it is not decoded, or ""."""

    stored: WholeImage
    sha256: bytes
    look: int | None
    too_large: str


def open_photo(item: Item, known: dict[Place, PhotoFile]) -> Photo | Problem:
    """Read the image file, unless another candidate of it has filled `known`."""
    source = item.candidate.source
    try:
        if item.place not in known:
            data = read_photo(item.place)
            whole, too_large = _verified(data, item.candidate.image)
            known[item.place] = PhotoFile(whole, sha256(data).digest(), photo_hash(data), too_large)
        file = known[item.place]
    except Rejected as rejected:
        return with_hint(rejected, item.candidate).problem(source)
    except BadSampleError as error:
        return Problem("sample", error.reason, error.detail, source)
    problem = Problem("sample", "too_many_pixels", file.too_large, source) if file.too_large else None
    photo = Photo(
        file.stored.size_px, file.sha256, file.stored.orientation, bool(item.upright), None, file.look, problem
    )
    evidence = None if photo.upright else _boxes_for_upright(item.candidate, photo)
    return replace(photo, upright=True, evidence=evidence) if evidence else photo


def _verified(data: bytes, image: str) -> tuple[WholeImage, str]:
    """Return the size of an image, and why it cannot be decoded at once: its rows can be read, and so can its boxes."""
    try:
        return verify_image(data, image, MAX_PIXELS), ""
    except BadSampleError as error:
        if error.reason != "too_many_pixels":
            raise
        try:
            large = read_large_header(BytesIO(data), len(data), MAX_PIXELS)
        except UnsupportedPixelsError as unsupported:
            raise BadSampleError(image, error.reason, str(unsupported)) from None
        if large is None:
            raise
        return WholeImage(large.size_px, large.orientation), f"{error.detail}. Build with --tiles"


def is_unclear(item: Item, photo: Photo) -> bool:
    """Return whether EXIF rotates the image and it is unknown whether its boxes were rotated too."""
    candidate = item.candidate
    if item.upright is not None or photo.upright or photo.orientation == 1 or not len(boxes_of(candidate)):
        return False
    if candidate.stated_size_px not in (None, photo.stored_px):
        return False
    if photo.upright_px == photo.stored_px:
        return True
    if candidate.stated_size_px:
        return False
    return candidate.units != "pixels" or bool(fit(boxes_of(candidate), photo.upright_px).all())


def _boxes_for_upright(candidate: Candidate, photo: Photo) -> Texts | None:
    """Return why the boxes must have been drawn on the upright image; None if that is not certain."""
    if photo.upright_px == photo.stored_px or candidate.stated_size_px == photo.stored_px:
        return None
    if candidate.stated_size_px == photo.upright_px:
        return {"en": "the annotation states the upright size", "zh": "标注写的是转正后的尺寸"}
    boxes = boxes_of(candidate)
    if candidate.units != "pixels" or not len(boxes):
        return None
    if not fit(boxes, photo.stored_px).all() and fit(boxes, photo.upright_px).all():
        return {
            "en": "its boxes leave the stored photo and fit the upright one",
            "zh": "框超出存储的图片,但符合转正后的图片",
        }
    return None
