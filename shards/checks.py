"""Looks at the image of a candidate: what of it can be trained on?"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from cogvlm_ft.data.reader import decode_image
from cogvlm_ft.data.record import BadSampleError, Record, box_defect, clip_box
from cogvlm_ft.data.tars import IMAGE_EXTENSIONS
from cogvlm_ft.grounding.targets import Box, Target
from shards.candidates import Candidate, Problem, Rejected, make_target


@dataclass(frozen=True)
class CheckedSample:
    """A sample that can be written. ext: lower case, without dot; image: the bytes of the file."""

    record: Record
    ext: str
    image: bytes


def check_candidate(
    candidate: Candidate, key: str, images: Path, max_pixels: int
) -> tuple[CheckedSample | None, list[Problem]]:
    """The sample without its bad parts (None if nothing is left), and every problem it has, also the reader's."""
    problems = list(candidate.problems)
    try:
        if not candidate.targets and not candidate.turns:
            raise _nothing_left(candidate, problems)
        ext = _extension(candidate.image)
        data = _read_image(images, candidate.image)
        image_size_px = _decoded_size(data, key, max_pixels)
        _check_stated_size(candidate, image_size_px)
        targets = [_fit_target(target, candidate.source, image_size_px, problems) for target in candidate.targets]
        kept = tuple(target for target in targets if target)
        if not kept and not candidate.turns:
            raise _nothing_left(candidate, problems)
    except Rejected as rejected:
        return None, [*problems, rejected.problem(candidate.source)]
    record = Record(key, image_size_px, candidate.source, kept, candidate.turns)
    return CheckedSample(record, ext, data), problems


def _nothing_left(candidate: Candidate, problems: list[Problem]) -> Rejected:
    if problems:
        return Rejected("sample", "no_targets_left", f"all targets of {candidate.image} were rejected")
    return Rejected("sample", "no_targets", f"nothing is annotated in {candidate.image}")


def _extension(image: str) -> str:
    ext = PurePosixPath(image).suffix[1:].lower()
    if ext not in IMAGE_EXTENSIONS:
        wanted = ", ".join(IMAGE_EXTENSIONS)
        raise Rejected("sample", "unsupported_extension", f"{image!r:.200} is none of {wanted}")
    return ext


def _read_image(images: Path, image: str) -> bytes:
    try:
        root, path = os.path.realpath(images), os.path.realpath(images / image)
        if os.path.commonpath([root, path]) != root:
            raise Rejected("sample", "path_outside_images", f"{image!r:.200} leads out of {images}")
        return Path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise Rejected("sample", "missing_image", f"no file {image!r:.200} in {images}") from None
    except (OSError, ValueError) as error:  # no permission, a circle of links; ValueError: a NUL in the name
        raise Rejected("sample", "unreadable_image", f"{image!r:.200}: {error}") from None


def _decoded_size(data: bytes, key: str, max_pixels: int) -> tuple[int, int]:
    try:
        return decode_image(data, key, max_pixels).size
    except BadSampleError as error:
        raise Rejected("sample", error.reason, error.detail) from None


def _check_stated_size(candidate: Candidate, image_size_px: tuple[int, int]) -> None:
    """Boxes made for another size (a resized or EXIF-rotated copy) would point somewhere else."""
    if candidate.stated_size_px not in (None, image_size_px):
        detail = f"the annotation is for {candidate.stated_size_px}, {candidate.image} has {image_size_px} pixels"
        raise Rejected("sample", "size_mismatch", detail)


def _fit_target(target: Target, source: str, image_size_px: tuple[int, int], problems: list[Problem]) -> Target | None:
    boxes: list[Box] = []
    for box in target.boxes_xyxy:
        defect = box_defect(box, image_size_px)
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
