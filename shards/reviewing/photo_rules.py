"""Rules for one candidate and its image."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np

from cogvlm_ft.data.record import box_defect, clip_box
from cogvlm_ft.grounding.boxes import boxes_from_bins, parse_boxes
from cogvlm_ft.grounding.targets import Box, Target, Turn
from cogvlm_ft.shards.packing.candidates import Candidate, Problem
from cogvlm_ft.shards.reviewing.photos import Photo, is_unclear
from cogvlm_ft.shards.reviewing.readings import Boxes, all_readings, fit, in_pixels, read_as
from cogvlm_ft.shards.reviewing.sources import Item
from cogvlm_ft.shards.reviewing.suspects import Suspect, View, suspect_of_problem
from cogvlm_ft.shards.reviewing.text_rules import count_defect, language_defect, phrase_defect, turn_defects

PATCH_PX = 14
_MAX_OTHERS = 300
"""Maximum number of boxes drawn in addition to the suspicious ones."""


def find_suspects(item: Item, photo: Photo | Problem, image_size: int) -> list[Suspect]:
    """Yield everything suspicious about one candidate alone.

    image_size: of training, for boxes under one patch.
    """
    return _Candidate(item, photo, image_size).suspects()


def view_of(item: Item, photo: Photo | None) -> View:
    """Return a view of the whole candidate with all boxes; a decision applies to the sample."""
    candidate = item.candidate
    boxes = tuple(box for target in candidate.targets for box in target.boxes_xyxy[:_MAX_OTHERS])
    return View(
        image=candidate.image,
        source=candidate.source,
        place=item.place,
        part=item.ids.sample,
        units=candidate.units,
        others=_pixels(boxes[:_MAX_OTHERS], candidate, photo),
        upright=photo is not None and photo.upright,
    )


class _Candidate:
    """One candidate during inspection."""

    def __init__(self, item: Item, photo: Photo | Problem, image_size: int) -> None:
        self.item = item
        self.candidate = item.candidate
        self.photo = photo if isinstance(photo, Photo) else None
        self.lost = photo if isinstance(photo, Problem) else photo.problem
        self.image_size = image_size
        self.ids = item.ids
        self.view = view_of(item, self.photo)
        self.pixels = [_pixels(target.boxes_xyxy, item.candidate, self.photo) for target in item.candidate.targets]

    def suspects(self) -> list[Suspect]:
        candidate = self.candidate
        problems = [*candidate.problems, *([self.lost] if self.lost else [])]
        found = [suspect_of_problem(problem, (self.view,)) for problem in problems]
        if not candidate.targets and not candidate.turns and all(problem.is_note for problem in problems):
            found.append(self._about(self.ids.sample, "no_targets", {}, self.view))
        if self.photo:
            found += self._exif_suspects(self.photo)
            if candidate.stated_size_px in (None, self.photo.size_px):
                found += self._box_suspects(self.photo)
            else:  # the boxes are of another image
                values = {"stated": size_text(candidate.stated_size_px), "stored": size_text(self.photo.size_px)}
                found.append(self._about(self.ids.sample, "size_mismatch", values, self.view))
        for number, target in enumerate(candidate.targets):
            found += self._target_suspects(target, number)
        found += self._repeated_phrases()
        for turn, part in zip(candidate.turns, self.ids.turns, strict=True):
            view = replace(self.view, part=part, phrase=turn.answer, marked=_answered_boxes(turn, self.photo))
            found += [self._about(part, kind, values, view) for kind, values in turn_defects(turn)]
        return found

    def _about(self, part: str, kind: str, values: dict[str, Any], *views: View) -> Suspect:
        return Suspect(f"{part}.{kind}", kind, part.partition("-")[0], self.candidate.source, values, views)

    def _exif_suspects(self, photo: Photo) -> list[Suspect]:
        """Check whether the image was rotated when it was annotated."""
        if not photo.evidence and not is_unclear(self.item, photo):
            return []
        values = {
            "orientation": photo.orientation,
            "stored": size_text(photo.stored_px),
            "upright": size_text(photo.upright_px),
        }
        views = [view_of(self.item, replace(photo, upright=upright)) for upright in (False, True)]
        views = [replace(view, marked=view.others, others=()) for view in views]
        views[1] = replace(views[1], part=None)  # one decision for both
        if photo.evidence:
            values |= {"evidence": photo.evidence["en"], "evidence_zh": photo.evidence["zh"]}
            return [self._about(self.ids.sample, "exif_rotated", values, *views)]
        return [self._about(self.ids.sample, "exif_unclear", values, *views)]

    def _box_suspects(self, photo: Photo) -> list[Suspect]:
        found = []
        for number, target in enumerate(self.candidate.targets):
            for box, marked, part in zip(target.boxes_xyxy, self.pixels[number], self.ids.boxes[number], strict=True):
                defect = self._box_defect(box, marked, photo)
                if defect:
                    kind, values, instead = defect
                    view = self._part_view(part, target, (box,), (marked,))
                    found.append(self._about(part, kind, values, replace(view, instead=instead)))
        return found

    def _box_defect(self, box: Box, marked: Box, photo: Photo) -> tuple[str, dict[str, Any], tuple[Box, ...]] | None:
        """Return (kind, values, the box if its numbers had another meaning)."""
        x0, y0, x1, y1 = clip_box(marked, photo.size_px)
        width, height = x1 - x0, y1 - y0
        kind = box_defect(marked, photo.size_px)
        if kind is None and max(width, height) < 1:
            kind = "below_one_pixel"
        if kind:
            fitting = _fitting(box, self.candidate.units, photo.size_px)
            names = " / ".join(name for name, _ in fitting[:2])
            values = {
                "box": box_text(box),
                "stored": size_text(photo.size_px),
                "by": f"{_leaves_by(marked, photo.size_px):.4g} px",
                "width": f"{width:.3g}",
                "height": f"{height:.3g}",
                "fits_as": f" It would fit as {names}." if names else "",
                "fits_as_zh": f"若按 {names} 解读则符合。" if names else "",
            }
            return kind, values, tuple(box for _, box in fitting[:1])
        patches = min(width / photo.size_px[0], height / photo.size_px[1]) * self.image_size / PATCH_PX
        if patches >= 1:
            return None
        sides = {"width": f"{width:.4g}", "height": f"{height:.4g}"}
        return "under_one_patch", {**sides, "patches": f"{patches:.2f}", "image_size": self.image_size}, ()

    def _target_suspects(self, target: Target, number: int) -> list[Suspect]:
        defects: list[tuple[str, dict[str, Any] | None]] = [
            ("wrong_language", language_defect(target.phrase, target.language)),
            ("count_mismatch", count_defect(target)),
            ("bad_box_text", phrase_defect(target)),
        ]
        part = self.ids.targets[number]
        view = self._target_view(number)
        return [self._about(part, kind, values, view) for kind, values in defects if values]

    def _repeated_phrases(self) -> list[Suspect]:
        by_phrase: dict[str, list[int]] = defaultdict(list)
        for number, target in enumerate(self.candidate.targets):
            by_phrase[plain_phrase(target.phrase)].append(number)
        found = []
        for first, *others in by_phrase.values():
            for other in others:
                a, b = self.candidate.targets[first], self.candidate.targets[other]
                if set(a.boxes_xyxy) != set(b.boxes_xyxy):
                    values = {"phrase": b.phrase, "first": boxes_text(a.boxes_xyxy), "second": boxes_text(b.boxes_xyxy)}
                    views = self._target_view(other), self._target_view(first)
                    found.append(self._about(self.ids.targets[other], "same_phrase", values, *views))
        return found

    def _target_view(self, number: int) -> View:
        target, part = self.candidate.targets[number], self.ids.targets[number]
        return self._part_view(part, target, target.boxes_xyxy, self.pixels[number])

    def _part_view(self, part: str, target: Target, as_read: tuple[Box, ...], marked: tuple[Box, ...]) -> View:
        return replace(
            self.view,
            part=part,
            phrase=target.phrase,
            language=target.language,
            as_read=as_read,
            marked=marked[:_MAX_OTHERS],
        )


def plain_phrase(phrase: str) -> str:
    """Simplify a phrase, so that phrases with the same meaning are equal."""
    return " ".join(phrase.casefold().split())


def size_text(size: tuple[int, int] | None) -> str:
    """Format for people."""
    return f"{size[0]} x {size[1]}" if size else "?"


def box_text(box: Box) -> str:
    """Format for people."""
    return f"[{', '.join(f'{number:.6g}' for number in box)}]"


def boxes_text(boxes: tuple[Box, ...]) -> str:
    """Format the first few boxes for people."""
    more = f" … ({len(boxes)})" if len(boxes) > 3 else ""
    return (" ".join(map(box_text, boxes[:3])) or "[]") + more


def _pixels(boxes: tuple[Box, ...], candidate: Candidate, photo: Photo | None) -> tuple[Box, ...]:
    """Convert to pixels; empty if the image size is unknown."""
    if not boxes or not photo:
        return ()
    return as_boxes(in_pixels(np.array(boxes), candidate.units, photo.size_px))


def _answered_boxes(turn: Turn, photo: Photo | None) -> tuple[Box, ...]:
    bins = parse_boxes(turn.answer)
    return as_boxes(boxes_from_bins(bins, photo.size_px))[:_MAX_OTHERS] if bins and photo else ()


def as_boxes(boxes: Boxes) -> tuple[Box, ...]:
    """Convert from float64[K, 4]."""
    return tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in boxes.tolist())


def _fitting(box: Box, units: str, image_size_px: tuple[int, int]) -> list[tuple[str, Box]]:
    """Describe other readings in which this box fits, and its place in them; another scale only if necessary."""
    found: list[tuple[str, Box]] = []
    for reading in all_readings(units)[1:]:
        if reading.layout == "corners" or (reading.scale != units and (found or reading.layout != "xyxy")):
            continue
        boxes_px = read_as(np.array([box]), reading, image_size_px)
        if fit(boxes_px, image_size_px).all():
            found.append((str(reading), as_boxes(boxes_px)[0]))
    return found


def _leaves_by(box: Box, image_size_px: tuple[int, int]) -> float:
    x0, y0, x1, y1 = box
    return max(-x0, -y0, x1 - image_size_px[0], y1 - image_size_px[1], 0.0)
