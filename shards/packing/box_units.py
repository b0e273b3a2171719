"""Decide the unit of the boxes of a source: pixels, thousandths, or fractions 0..1 of the image.

Tools disagree about the unit in some formats. Readers of such formats mark their candidates, and one unit is chosen for
all of them: a source comes from one tool. Where two units fit, the source is refused and the user states the unit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from cogvlm_ft.data.record import BOX_TOLERANCE_PX
from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.formats.box_text import is_unpadded_box, num_padded_boxes
from cogvlm_ft.shards.packing.box_forms import FormEvidence
from cogvlm_ft.shards.packing.box_percent import PercentEvidence
from cogvlm_ft.shards.packing.candidates import Candidate, Problem, UnitBasis, Units, WrittenAs, box_in_pixels
from cogvlm_ft.shards.packing.photo_headers import MAX_PHOTOS, PhotoHeaders

BOX_UNITS: dict[str, Units] = {"pixel": "pixels", "thousandth": "thousandths", "unit": "unit"}
"""Values of --box-unit, besides "auto"."""

_OPTIONS = {units: f"--box-unit {option}" for option, units in BOX_UNITS.items()}
_WORDS = {"pixels": "pixels", "thousandths": "thousandths", "unit": "fractions 0..1"}
_ROUNDING = 0.02  # fractions may be slightly outside 0..1
_MIN_BAD_BOXES, _MIN_BAD_FRACTION, _FITS = 3, 0.1, 0.95
_RARE = 0.02
_LIKELY, _CERTAIN = math.log(20), math.log(1000)
_NEAR = 0.05


class UnclearUnitError(DataError):
    """The boxes of a source fit two units, or none."""


Group = tuple[Units, UnitBasis]
"""Candidates that are read alike: the unit that the reader assumes, and why."""


@dataclass
class Evidence:
    """Evidence from the boxes of one group.

    num_boxes: of positive area. num_sized: of these, in an image of known size. fits: by unit.
    over_1000: the first box with a larger value. example: box, phrase, image and size of the first sized box.
    log_odds: how much more likely the images are in thousandths than in pixels, where boxes may be anywhere in the
        field of their unit, and one image of fifty has a wrong box.
    reach: by unit, the lowest x0 and y0 and the highest x1 and y1, as fractions of the image.
    """

    num_boxes: int = 0
    num_sized: int = 0
    fits: Counter[Units] = field(default_factory=Counter)
    has_fractions: bool = False
    over_1000: str | None = None
    example: tuple[Box, str, str, tuple[int, int]] | None = None
    log_odds: float = 0.0
    reach: dict[Units, list[float]] = field(default_factory=dict)
    percent: PercentEvidence = field(default_factory=PercentEvidence)

    def add(self, candidate: Candidate, sizes: list[tuple[int, int]]) -> None:
        """Add the boxes of an image; sizes: as stored and as its EXIF orientation turns it, empty if unknown."""
        num_sized, num_outside = self.num_sized, self.num_outside
        self.percent.add(candidate, sizes)
        for target in candidate.targets:
            for box in target.boxes_xyxy:
                if box[0] < box[2] and box[1] < box[3]:  # others are invalid in every unit
                    self._add_box(box, candidate, target.phrase, sizes)
        if self.num_sized > num_sized:
            width, height = sizes[0]
            is_outside = self.num_outside > num_outside
            chance = 1 - min(width / 1000, 1) * min(height / 1000, 1)  # of a box in thousandths to be outside in pixels
            is_wrong = max(chance, _RARE**2) / _RARE
            self.log_odds += math.log(is_wrong if is_outside else width * height / 1000**2)

    def _add_box(self, box: Box, candidate: Candidate, phrase: str, sizes: list[tuple[int, int]]) -> None:
        self.num_boxes += 1
        is_unit = max(box) <= 1 + _ROUNDING and min(box) >= -_ROUNDING
        is_whole = all(value % 1 == 0 for value in box)
        self.has_fractions |= is_unit and not is_whole
        self.fits["unit"] += is_unit
        if max(box) > 1000:
            self.over_1000 = self.over_1000 or f"{_numbers(box)} of {phrase!r} ({candidate.source})"
        elif min(box) >= -BOX_TOLERANCE_PX:
            self.fits["thousandths"] += 1
            self._extend("thousandths", box, (1000, 1000))
        if not sizes:
            return
        self.num_sized += 1
        self.example = self.example or (box, phrase, candidate.image, sizes[0])
        inside = [size for size in sizes if _is_inside(box, size)]
        if inside and (is_whole or not is_unit):
            self.fits["pixels"] += 1
            self._extend("pixels", box, inside[0])

    def _extend(self, units: Units, box: Box, size: tuple[int, int]) -> None:
        x0, y0, x1, y1 = box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1]
        reach = self.reach.setdefault(units, [x0, y0, x1, y1])
        reach[:] = min(reach[0], x0), min(reach[1], y0), max(reach[2], x1), max(reach[3], y1)

    @property
    def num_outside(self) -> int:
        """Return the number of boxes that are not possible in pixels."""
        return self.num_sized - self.fits["pixels"]

    def fits_all(self, units: Units) -> bool:
        """Return whether no box contradicts the unit."""
        if units == "pixels":
            return self.num_outside == 0
        return self.fits[units] == self.num_boxes

    def fits_nearly_all(self, units: Units) -> bool:
        """Return whether few boxes contradict the unit; one value above 1000 contradicts thousandths."""
        if units == "pixels":
            return self.fits["pixels"] >= _FITS * self.num_sized
        is_possible = units == "unit" or self.over_1000 is None
        return is_possible and self.fits[units] >= _FITS * self.num_boxes

    def tells(self, units: Units) -> bool:
        """Return whether boxes that fit pixels and thousandths fill the range of one of them and end there."""
        odds = self.log_odds if units == "thousandths" else -self.log_odds
        left, top, right, bottom = self.reach.get(units, [1.0, 1.0, 0.0, 0.0])
        fills = max(left, top) <= _NEAR and min(right, bottom) >= 1 - _NEAR
        return fills and odds > _CERTAIN


@dataclass
class TextEvidence:
    """Evidence from the boxes in turns, which are always read as thousandths.

    num_boxes, num_padded: in three digits, and of these with a number such as 086. unpadded: the first text in double
        brackets that is not in three digits.
    """

    num_boxes: int = 0
    num_padded: int = 0
    unpadded: Problem | None = None

    def add(self, candidate: Candidate) -> None:
        """Add the turns of an image, and what was rejected of them."""
        for turn in candidate.turns:
            for text in (turn.prompt, turn.answer):
                num_boxes, num_padded = num_padded_boxes(text)
                self.num_boxes += num_boxes
                self.num_padded += num_padded
        self.unpadded = self.unpadded or next(filter(is_unpadded_box, candidate.problems), None)

    def check(self, annotations: Path) -> None:
        """Raise UnclearUnitError if no box is padded though some need it: those of three digits may be pixels too."""
        if self.unpadded and self.num_boxes and not self.num_padded:
            raise UnclearUnitError(
                f"{annotations.name}: boxes in texts could be pixels: none of {self.num_boxes} has a leading zero, and "
                f"{self.unpadded.source} has one without three digits: {self.unpadded.detail:.80}; expected "
                "thousandths such as 086. Write them so, or add --box-unit thousandth if those of three digits are "
                "thousandths."
            )


@dataclass(frozen=True)
class BoxUnits:
    """units_of: the decided unit by group. explanation: one line for people, empty if every box states its unit."""

    units_of: dict[Group, Units]
    explanation: str = ""
    notes: tuple[Problem, ...] = ()

    @property
    def is_as_read(self) -> bool:
        """Return whether no candidate changes."""
        return all(units == group[0] for group, units in self.units_of.items())

    def settle(self, candidate: Candidate) -> Candidate:
        """Return the candidate in the decided unit."""
        units = self.units_of.get((candidate.units, candidate.unit_basis), candidate.units)
        return candidate if units == candidate.units else replace(candidate, units=units)


class UnitSurvey:
    """The evidence of a source, gathered while it is read.

    headers: of its photos, for sizes that are not stated.
    """

    def __init__(self, headers: PhotoHeaders) -> None:
        self._headers = headers
        self._num_opened = 0
        self._stated: set[Units] = set()
        self._groups: dict[Group, Evidence] = {}
        self._forms: dict[tuple[Group, WrittenAs], FormEvidence] = {}
        self._texts = TextEvidence()

    def add(self, part: Candidate | Problem) -> None:
        """Add a part of the source."""
        if isinstance(part, Problem):
            return
        self._texts.add(part)
        if not any(target.boxes_xyxy for target in part.targets):
            return
        is_in_pixels = part.written_as is not None and part.units != "unit"
        sizes = self._sizes(part) if is_in_pixels or part.unit_basis != "stated" else []
        self._add_forms(part, sizes)
        if part.unit_basis == "stated":
            self._stated.add(part.units)
            return
        self._groups.setdefault((part.units, part.unit_basis), Evidence()).add(part, sizes)

    def _add_forms(self, part: Candidate, sizes: list[tuple[int, int]]) -> None:
        if part.written_as is None:
            return
        key = (part.units, part.unit_basis), part.written_as
        evidence = self._forms.setdefault(key, FormEvidence(part.written_as))
        if part.units == "unit":
            places = [(1, 1)]
        else:
            places = [*sizes, (1000, 1000)] if sizes and part.units == "thousandths" else sizes
        for target in part.targets:
            for box in target.boxes_xyxy:
                evidence.add(box, target.phrase, places)

    def check_stated(self, annotations: Path) -> None:
        """Raise UnclearUnitError if boxes of a stated unit only fit in another form."""
        self._check_forms(annotations)
        self._check_exchanged({}, annotations)

    def _check_forms(self, annotations: Path) -> None:
        """Raise UnclearUnitError if the boxes only fit in another form, such as sizes in place of corners."""
        for evidence in self._forms.values():
            found = evidence.describe(exchanged=False)
            if found:
                raise UnclearUnitError(f"{annotations.name}: {found}")

    def _check_exchanged(self, units_of: dict[Group, Units], annotations: Path, problem: str = "") -> None:
        """Raise UnclearUnitError if the boxes only fit with x and y exchanged. problem: with their unit, if any."""
        for (group, _), evidence in self._forms.items():
            found = evidence.describe(exchanged=True) if units_of.get(group, group[0]) == group[0] else None
            if found:
                raise UnclearUnitError(f"{problem} Or " * bool(problem) + f"{annotations.name}: {found}")

    def decide(self, box_unit: str, annotations: Path) -> BoxUnits:
        """Return the decision; box_unit: of the user, or "auto". Raises DataError."""
        if box_unit != "thousandth":
            self._texts.check(annotations)
        self._check_forms(annotations)
        if box_unit != "auto":
            self._check_exchanged(dict.fromkeys(self._groups, BOX_UNITS[box_unit]), annotations)
            return self._as_told(box_unit, annotations)
        units_of: dict[Group, Units] = {}
        lines: list[str] = []
        notes: list[Problem] = []
        for group, evidence in self._groups.items():
            try:
                units = units_of[group] = _decide(group, evidence, annotations)
            except UnclearUnitError as error:
                self._check_exchanged({}, annotations, str(error))
                raise
            line = f"box unit: {_WORDS[units]}: {_explain(units, evidence)}"
            lines.append(line)
            if group[1] == "unknown" or units != group[0]:
                detail = f"{line}. If that is wrong, state the unit with --box-unit."
                notes.append(Problem("note", "box_unit_inferred", detail, annotations.name))
        self._check_exchanged(units_of, annotations)
        return BoxUnits(units_of, "\n".join(lines), tuple(notes))

    def _as_told(self, box_unit: str, annotations: Path) -> BoxUnits:
        units = BOX_UNITS[box_unit]
        if not self._groups and self._stated and units not in self._stated:
            found = " and ".join(_WORDS[stated] for stated in sorted(self._stated))
            raise DataError(
                f"--box-unit {box_unit}: {annotations} states that its boxes are {found}; expected that unit. "
                "Omit the option."
            )
        explanation = f"box unit: {_WORDS[units]} (--box-unit {box_unit})"
        return BoxUnits(dict.fromkeys(self._groups, units), explanation)

    def _sizes(self, candidate: Candidate) -> list[tuple[int, int]]:
        if candidate.stated_size_px:
            return [candidate.stated_size_px]
        if self._num_opened >= MAX_PHOTOS:
            return []
        self._num_opened += 1
        header = self._headers.read(candidate)
        if header is None or header.size_px is None:
            return []
        turned = header.size_px[::-1]
        return [header.size_px, turned] if header.orientation >= 5 else [header.size_px]


def survey_units(parts: Iterable[Candidate | Problem], images: Path) -> UnitSurvey:
    """Return the evidence of all parts of a source."""
    headers = PhotoHeaders(images)
    survey = UnitSurvey(headers)
    for part in headers.ahead(parts):
        survey.add(part)
    return survey


def _decide(group: Group, evidence: Evidence, annotations: Path) -> Units:
    """Return the one unit that fits; raises UnclearUnitError if there are two, or none."""
    assumed, basis = group
    if evidence.num_boxes and evidence.fits_all("unit"):
        if not evidence.has_fractions:
            raise _refused(["unit", "pixels"], evidence, annotations)
        return "unit"
    fitting = _fitting_documented(assumed, evidence) if basis == "documented" else _fitting(assumed, evidence)
    if len(fitting) != 1:
        raise _refused(fitting, evidence, annotations)
    found = evidence.percent.describe() if fitting == ["pixels"] else None
    if found:
        raise UnclearUnitError(f"{annotations.name}: {found}")
    return fitting[0]


def _fitting_documented(documented: Units, evidence: Evidence) -> list[Units]:
    """Return the documented unit; also another one that the boxes speak for, or that one alone."""
    if documented == "unit":
        return ["unit"]  # all boxes of a file were fractions
    if documented == "thousandths":
        if evidence.over_1000:
            return ["pixels"] if evidence.num_sized and evidence.fits_all("pixels") else []
        return (
            ["thousandths", "pixels"] if evidence.fits_all("pixels") and evidence.tells("pixels") else ["thousandths"]
        )
    others: list[Units] = [units for units in ("thousandths", "unit") if evidence.fits_nearly_all(units)]  # type: ignore[misc]
    many_bad = evidence.num_outside >= max(_MIN_BAD_BOXES, _MIN_BAD_FRACTION * evidence.num_sized)
    if (many_bad and others) or (evidence.fits_all("thousandths") and evidence.tells("thousandths")):
        return ["pixels", *others]
    return ["pixels"]


def _fitting(assumed: Units, evidence: Evidence) -> list[Units]:
    """Return the units that fit boxes in pixels or thousandths."""
    if not evidence.num_sized:
        return ["pixels" if evidence.over_1000 else assumed]  # without a photo there is no sample
    if evidence.over_1000:
        return ["pixels"] if evidence.fits_nearly_all("pixels") else []
    if (evidence.num_outside and evidence.log_odds > _LIKELY) or evidence.tells("thousandths"):
        return ["thousandths"]
    if evidence.fits_all("pixels") and evidence.tells("pixels"):
        return ["pixels"]
    return ["pixels", "thousandths"]


def _explain(units: Units, evidence: Evidence) -> str:
    inside = f"{evidence.fits['pixels']} of {evidence.num_sized} boxes are inside their photos in pixels"
    largest = f"one is above 1000: {evidence.over_1000}" if evidence.over_1000 else "no value is above 1000"
    if units == "unit":
        return f"no value of {evidence.num_boxes} boxes is above 1"
    return f"{inside}; {largest}"


def _refused(fitting: list[Units], evidence: Evidence, annotations: Path) -> UnclearUnitError:
    options = " or ".join(_OPTIONS[units] for units in fitting or ("pixels", "thousandths"))
    found = _explain("pixels", evidence)
    problem = "the boxes fit two units" if fitting else "the boxes fit no unit"
    if len(fitting) > 1 and evidence.example:
        box, phrase, image, size = evidence.example
        readings = ", ".join(f"{_numbers(box_in_pixels(box, units, size))} px as {_WORDS[units]}" for units in fitting)
        found += f"; {phrase!r} in {image} is {readings}"
    advice = f"Add {options}" if fitting else f"Correct the boxes, or add {options}: boxes that do not fit are rejected"
    return UnclearUnitError(f"{annotations.name}: {problem}: {found}; expected one unit for all boxes. {advice}.")


def _is_inside(box: Box, size: tuple[int, int]) -> bool:
    right, bottom = size[0] + BOX_TOLERANCE_PX, size[1] + BOX_TOLERANCE_PX
    return min(box[0], box[1]) >= -BOX_TOLERANCE_PX and box[2] <= right and box[3] <= bottom


def _numbers(box: Box) -> str:
    return f"({', '.join(f'{value:.5g}' for value in box)})"
