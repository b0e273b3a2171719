"""What is known about the photo of a candidate without decoding it, also which way up its boxes were drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256

from cogvlm_ft.data.reader import MAX_PIXELS, upright_size
from cogvlm_ft.data.record import BadSampleError
from cogvlm_ft.shards.packing.candidates import Candidate, Problem, Rejected
from cogvlm_ft.shards.packing.verify import verify_image
from cogvlm_ft.shards.reviewing.readings import boxes_of, fit
from cogvlm_ft.shards.reviewing.sources import Item, read_photo
from cogvlm_ft.shards.reviewing.suspect_texts import Words


@dataclass(frozen=True)
class Photo:
    """stored_px: (width, height) of the file. orientation: by EXIF, 1 to 8.

    upright: its boxes are those of the turned photo. evidence: how we know, if nobody said so.
    """

    stored_px: tuple[int, int]
    sha256: bytes
    orientation: int = 1
    upright: bool = False
    evidence: Words | None = None

    @property
    def upright_px(self) -> tuple[int, int]:
        """The size that a viewer shows."""
        return upright_size(self.stored_px, self.orientation)

    @property
    def size_px(self) -> tuple[int, int]:
        """The size that its boxes were drawn for."""
        return self.upright_px if self.upright else self.stored_px


def open_photo(item: Item) -> Photo | Problem:
    """Reads the file once."""
    source = item.candidate.source
    try:
        data = read_photo(item.place)
        stored = verify_image(data, item.candidate.image, MAX_PIXELS)
    except Rejected as rejected:
        return rejected.problem(source)
    except BadSampleError as error:
        return Problem("sample", error.reason, error.detail, source)
    photo = Photo(stored.size_px, sha256(data).digest(), stored.orientation, bool(item.upright))
    evidence = None if photo.upright else _boxes_for_upright(item.candidate, photo)
    return replace(photo, upright=True, evidence=evidence) if evidence else photo


def is_unclear(item: Item, photo: Photo) -> bool:
    """True if EXIF turns the photo, and neither a build nor the numbers tell whether its boxes were turned too."""
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


def _boxes_for_upright(candidate: Candidate, photo: Photo) -> Words | None:
    """Why the boxes must have been drawn on the turned photo; None if that is not certain."""
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
