"""Check a candidate against its image, and keep what can be trained on."""

from __future__ import annotations

import posixpath
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import IO

from cogvlm_ft.data.pixels import UnsupportedPixelsError
from cogvlm_ft.data.reader import upright_size
from cogvlm_ft.data.record import BadSampleError, Record, box_defect, clip_box
from cogvlm_ft.data.row_streams import MAX_STREAMED_BYTES, LargeHeader, read_large_header
from cogvlm_ft.data.tars import IMAGE_EXTENSIONS, MAX_MEMBER_BYTES
from cogvlm_ft.grounding.targets import Box, Target
from cogvlm_ft.shards.packing.candidates import Candidate, Problem, Rejected, Units, box_in_pixels, make_target
from cogvlm_ft.shards.packing.files import open_inside, read_embedded, read_inside
from cogvlm_ft.shards.packing.verify import VERIFY, WholeImage, verify_image


@dataclass(frozen=True)
class CheckedSample:
    """A sample that can be written. ext: lower case, without dot; image: the bytes of the file.

    tiles: a file of the tiles that follow the image, if `record.tiles` is set. A photo that is too large to be decoded
    at once has no bytes until it is in tiles.
    """

    record: Record
    ext: str
    image: bytes
    tiles: IO[bytes] | None = None


def check_candidate(
    candidate: Candidate,
    key: str,
    images: Path,
    max_pixels: int,
    verify: str = VERIFY[0],
    *,
    apply_exif: bool = False,
    keep_background: bool = False,
    streams_large: bool = False,
) -> tuple[CheckedSample | None, list[Problem]]:
    """Return the sample without its invalid parts (None if nothing is left), and all problems, also the reader's.

    apply_exif: the boxes are drawn on the photo as its EXIF orientation turns it.
    keep_background: an image in which nothing is annotated becomes a sample without targets.
    streams_large: a photo above `max_pixels` whose rows can be streamed is a sample without bytes.
    """
    problems = list(candidate.problems)
    try:
        is_background = keep_background and candidate.is_background
        if not candidate.targets and not candidate.turns and not is_background:
            raise _nothing_left(candidate)
        large = large_photo(candidate, images, max_pixels) if streams_large else None
        if large:
            ext, data, stored = _extension(candidate.image), b"", WholeImage(large.size_px, large.orientation)
        else:
            ext, data = read_image(candidate, images)
            stored = _verified(data, key, max_pixels, verify)
        is_upright = not apply_exif or stored.orientation == 1
        image_size_px = stored.size_px if is_upright else upright_size(*stored)
        _check_stated_size(candidate, image_size_px, stored.size_px)
        targets = [
            _fit_target(target, candidate.units, candidate.source, image_size_px, problems)
            for target in candidate.targets
        ]
        kept = _without_contradictions([target for target in targets if target], candidate, problems)
        if not kept and not candidate.turns and not is_background:
            raise Rejected("sample", "no_targets_left", f"all targets of {candidate.image} were rejected")
    except Rejected as rejected:
        return None, [*problems, rejected.problem(candidate.source)]
    source = candidate.source.encode("utf-8", "backslashreplace").decode()  # the name of a file may not be valid UTF-8
    record = Record(key, image_size_px, source, kept, candidate.turns, upright=not is_upright)
    return CheckedSample(record, ext, data), problems


def read_image(candidate: Candidate, images: Path, *, num_first: int | None = None) -> tuple[str, bytes]:
    """Return (extension, bytes) of the image file, or of the image inside the annotation. Raises Rejected.

    num_first: of a file, its first bytes only.
    """
    try:
        ext = _extension(candidate.image)
        return ext, read_inside(images, candidate.image, "image", MAX_MEMBER_BYTES, num_first=num_first)
    except Rejected as rejected:
        if candidate.embedded_in is None or rejected.reason not in ("missing_image", "unsupported_extension"):
            raise with_hint(rejected, candidate) from None
        return read_embedded(candidate.embedded_in)


def open_large(candidate: Candidate, images: Path) -> AbstractContextManager[tuple[FileIO, int]]:
    """Open the file of a photo that is not read as a whole."""
    return open_inside(images, candidate.image, "image", MAX_STREAMED_BYTES)


def large_photo(candidate: Candidate, images: Path, max_pixels: int) -> LargeHeader | None:
    """Return the header of a photo above `max_pixels`; None for others and for those that `read_image` reports.

    Raises Rejected if its rows cannot be streamed.
    """
    try:
        with open_large(candidate, images) as (file, num_bytes):
            try:
                return read_large_header(file, num_bytes, max_pixels)
            except UnsupportedPixelsError as error:
                raise Rejected("sample", "too_many_pixels", f"{candidate.image}: {error}") from None
    except Rejected as rejected:
        if rejected.reason == "too_many_pixels":
            raise
        return None


def with_hint(rejected: Rejected, candidate: Candidate) -> Rejected:
    """Return the reason why the image cannot be read, with what is known about similar files."""
    return Rejected(rejected.level, rejected.reason, f"{rejected.detail} {candidate.image_hint}".rstrip())


def _nothing_left(candidate: Candidate) -> Rejected:
    if candidate.is_background:
        return nothing_annotated(candidate)
    return Rejected("sample", "no_targets_left", f"all targets of {candidate.image} were rejected")


def nothing_annotated(candidate: Candidate) -> Rejected:
    """Return the reason why an image without annotations is left out."""
    return Rejected("sample", "no_targets", f"nothing is annotated in {candidate.image}")


def _extension(image: str) -> str:
    ext = posixpath.splitext(image)[1][1:].lower()
    if ext not in IMAGE_EXTENSIONS:
        expected = ", ".join(IMAGE_EXTENSIONS)
        raise Rejected("sample", "unsupported_extension", f"{image!r:.200} is not supported; expected {expected}")
    return ext


def _verified(data: bytes, key: str, max_pixels: int, verify: str) -> WholeImage:
    try:
        return verify_image(data, key, max_pixels, verify)
    except BadSampleError as error:
        hint = ". Cut it into tiles: --tiles 980" if error.reason == "too_many_pixels" else ""
        raise Rejected("sample", error.reason, error.detail + hint) from None


def _check_stated_size(candidate: Candidate, image_size_px: tuple[int, int], stored_px: tuple[int, int]) -> None:
    """Raise Rejected if the boxes were made for another size, such as that of a resized copy.

    Some tools state the stored size though they show the image upright.
    """
    if candidate.stated_size_px not in (None, image_size_px, stored_px):
        detail = f"the annotation is for {candidate.stated_size_px}, {candidate.image} has {image_size_px} pixels"
        raise Rejected("sample", "size_mismatch", detail)


def _without_contradictions(targets: list[Target], candidate: Candidate, problems: list[Problem]) -> tuple[Target, ...]:
    """Return the targets without those that are absent and present in one image, also if that box was rejected."""
    absent = {target.phrase for target in targets if not target.boxes_xyxy}
    both = absent and absent & {target.phrase for target in candidate.targets if target.boxes_xyxy}
    for phrase in sorted(both):
        detail = f"{phrase!r:.200} is present and absent in this image; expected one of both. Correct the annotation."
        problems.append(Problem("target", "contradiction", detail, candidate.source))
    return tuple(target for target in targets if target.phrase not in both)


def _is_fraction(box: Box, units: Units) -> str | None:
    """Return "normalised_box" for a box in pixels that is smaller than the first pixel of its image."""
    is_small = units == "pixels" and min(box) >= 0 and max(box) <= 1
    return "normalised_box" if is_small and not all(value % 1 == 0 for value in box) else None


def _fit_target(
    target: Target, units: Units, source: str, image_size_px: tuple[int, int], problems: list[Problem]
) -> Target | None:
    boxes: list[Box] = []
    for found in target.boxes_xyxy:
        box = box_in_pixels(found, units, image_size_px)
        defect = _is_fraction(found, units) or box_defect(box, image_size_px)
        if defect:
            detail = f"box {list(box)} (x0, y0, x1, y1) of {target.phrase!r} in an image of {image_size_px}"
            problems.append(Problem("box", defect, detail, source))
        else:
            boxes.append(clip_box(box, image_size_px))
    try:
        fitted = make_target(target.phrase, boxes, num_boxes_found=len(target.boxes_xyxy))
    except Rejected as rejected:
        problems.append(rejected.problem(source))
        return None
    return replace(target, boxes_xyxy=fitted.boxes_xyxy)
