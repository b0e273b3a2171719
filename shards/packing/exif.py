"""Decide whether the boxes of a source were drawn on images rotated by EXIF orientation, or on the pixels as stored.

There is one decision per source: one tool annotates all its images in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from cogvlm_ft.data.reader import upright_size
from cogvlm_ft.data.record import box_defect
from cogvlm_ft.shards.packing.candidates import Candidate
from cogvlm_ft.shards.packing.photo_headers import MAX_PHOTOS, PhotoHeader, PhotoHeaders

EXIF_MODES = ("auto", "apply", "ignore")
UPRIGHT, STORED = "upright", "as stored"


@dataclass(frozen=True)
class ExifDecision:
    """apply: rotate images upright, because their boxes were drawn on them so. explanation: one line for people."""

    apply: bool
    explanation: str


@dataclass
class Evidence:
    """Evidence from the images that EXIF orientation rotates.

    boxes: number of images whose boxes are inside them in one way only. sizes: number of images whose stated size
    matches in one way only.
    """

    num_photos: int = 0
    num_turned: int = 0
    boxes: dict[str, int] = field(default_factory=lambda: {UPRIGHT: 0, STORED: 0})
    sizes: dict[str, int] = field(default_factory=lambda: {UPRIGHT: 0, STORED: 0})

    def add(self, candidate: Candidate, header: PhotoHeader) -> None:
        """Add one image."""
        self.num_photos += 1
        if header.size_px is None or header.orientation == 1:
            return
        self.num_turned += 1
        sizes = {UPRIGHT: upright_size(header.size_px, header.orientation), STORED: header.size_px}
        if sizes[UPRIGHT] == sizes[STORED]:  # upside down or square
            return
        _count(self.sizes, {way for way, size in sizes.items() if candidate.stated_size_px == size})
        if candidate.units == "pixels":
            _count(self.boxes, {way for way, size in sizes.items() if _is_inside(candidate, size)})


def decide_exif(candidates: Iterable[Candidate], headers: PhotoHeaders, mode: str) -> ExifDecision:
    """Decide by the first MAX_PHOTOS candidates if the mode is "auto"; unreadable images are skipped.

    mode: one of EXIF_MODES.
    """
    if mode != "auto":
        done = "turned upright" if mode == "apply" else "taken as stored"
        return ExifDecision(mode == "apply", f"EXIF: photos are {done} (--exif {mode})")
    evidence = Evidence()
    for candidate in islice(candidates, MAX_PHOTOS):
        header = headers.read(candidate)
        if header:
            evidence.add(candidate, header)
    return judge(evidence)


def judge(evidence: Evidence) -> ExifDecision:
    """Decide by the boxes, else by the stated sizes, else upright, as most tools show images."""
    seen = f"EXIF: {evidence.num_turned} of {evidence.num_photos} photos have an EXIF rotation"
    if not evidence.num_turned:
        return ExifDecision(True, f"{seen}; any others are turned upright")
    votes = f"{_words(evidence.boxes, 'fit only')}; {_words(evidence.sizes, 'state the size of')}"
    for counts in (evidence.boxes, evidence.sizes):
        if counts[UPRIGHT] != counts[STORED]:
            apply = counts[UPRIGHT] > counts[STORED]
            done = "photos are turned upright with their boxes" if apply else "photos are taken as stored"
            return ExifDecision(apply, f"{seen}: {votes}: {done}")
    return ExifDecision(
        True,
        f"{seen}: {votes}: no evidence of how they were annotated. They are turned upright, as most tools show them."
        " Check some, and build with --exif ignore if the boxes are wrong.",
    )


def _words(counts: dict[str, int], what: str) -> str:
    return f"{counts[UPRIGHT]} {what} the upright photo, {counts[STORED]} the stored one"


def _count(counts: dict[str, int], ways: set[str]) -> None:
    """Count evidence that supports one way only."""
    if len(ways) == 1:
        counts[ways.pop()] += 1


def _is_inside(candidate: Candidate, size_px: tuple[int, int]) -> bool:
    boxes = [box for target in candidate.targets for box in target.boxes_xyxy]
    return all(box_defect(box, size_px) != "box_outside_image" for box in boxes)
