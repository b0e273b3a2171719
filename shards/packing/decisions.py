"""Load decisions about suspicious parts of the annotations, and apply them to the candidates of a build.

{"decisions": [{"id": "box-5b1f0c2a9d3e4f60", "decision": "drop"},
               {"id": "target-0a…", "decision": "edit", "phrase": "the red car", "boxes": [[10, 20, 300, 400]]}]}

or the same columns as CSV. The ids are those of a review. They depend on the part and on the key of its sample, not on
its position in the file, so they stay valid while other parts change.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Box, Target, Turn
from cogvlm_ft.plain_files import read_bytes
from cogvlm_ft.shards.packing.candidates import Candidate, Problem, Rejected, check_text, four_numbers, make_target
from cogvlm_ft.shards.packing.splits import key_of

_ORIGIN = (
    "Expected the decisions of a review: shards/review.py writes review.html, whose button saves review_decisions.json"
)
MAX_FILE_BYTES = 64 * 2**20
DECISIONS = ("accept", "drop", "edit")
EDITABLE = {
    "sample": (),
    "target": ("phrase", "language", "description", "boxes"),
    "box": ("boxes",),
    "turn": ("prompt", "answer"),
}
"""What an edit may replace, by level. Boxes are in the units of the annotation; [] marks the target as absent."""
_FOR_PEOPLE = ("image", "source", "kind", "note")  # ignored


class PartIds(NamedTuple):
    """The ids of a candidate and of its parts, in their order."""

    sample: str
    targets: tuple[str, ...]
    boxes: tuple[tuple[str, ...], ...]
    turns: tuple[str, ...]


@dataclass(frozen=True)
class Decision:
    """One row. place: its position in the file; changes: the new values of an edit."""

    part: str
    decision: str
    changes: dict[str, Any]
    place: str

    @property
    def level(self) -> str:
        """Return the level of the part: "sample", "target", "box" or "turn"."""
        return self.part.partition("-")[0]


def part_ids(candidate: Candidate) -> PartIds:
    """Return ids that are equal for equal content, in an annotation file and in the shards built from it."""
    key, seen = key_of(candidate), Counter[str]()

    def make(level: str, *content: Any) -> str:
        text = json.dumps([key, *content])  # ASCII, also of names that are no UTF-8
        seen[level + text] += 1
        digest = blake2b(f"{text}{seen[level + text]}".encode(), digest_size=8).hexdigest()
        return f"{level}-{digest}"

    return PartIds(
        make("sample"),
        tuple(make("target", target.phrase) for target in candidate.targets),
        tuple(tuple(make("box", target.phrase, box) for box in target.boxes_xyxy) for target in candidate.targets),
        tuple(make("turn", turn.prompt, turn.answer) for turn in candidate.turns),
    )


class Decisions:
    """The decisions of one file, by part; records which of them were applied."""

    def __init__(self, rows: list[Decision]) -> None:
        self._rows: dict[str, Decision] = {}
        self._met: set[str] = set()
        for row in rows:
            first = self._rows.setdefault(row.part, row)
            if (first.decision, first.changes) != (row.decision, row.changes):
                raise DataError(f"{row.place} and {first.place} decide differently about {row.part}. Keep one of them.")

    def __len__(self) -> int:
        return len(self._rows)

    def apply(self, candidate: Candidate) -> tuple[Candidate | None, list[Problem]]:
        """Return the candidate without dropped and with edited parts; its `problems` list what was dropped.

        If nothing is left of it: None, and all its problems.
        """
        ids = part_ids(candidate)
        if not self._decides_about(ids):
            return candidate, []
        if self._dropped(ids.sample):
            problem = Problem("sample", "dropped_by_review", self._who(ids.sample, candidate.image), candidate.source)
            return None, [*candidate.problems, problem]
        problems = list(candidate.problems)
        targets = [
            self._target(target, ids.targets[i], ids.boxes[i], candidate.source, problems)
            for i, target in enumerate(candidate.targets)
        ]
        turns = [self._turn(turn, ids.turns[i], candidate.source, problems) for i, turn in enumerate(candidate.turns)]
        kept = replace(
            candidate,
            targets=tuple(target for target in targets if target),
            turns=tuple(turn for turn in turns if turn),
            problems=tuple(problems),
        )
        if kept.targets or kept.turns:
            return kept, []
        detail = f"nothing is left of {candidate.image} after the decisions"
        return None, [*problems, Problem("sample", "no_targets_left", detail, candidate.source)]

    def unmet(self) -> list[Problem]:
        """Return the decisions that matched nothing. Call it after all candidates."""
        hint = "no such part, or its parent was dropped or replaced. Check that the review is of these annotations."
        return [
            Problem(row.level, "decision_fits_nothing", f"{row.decision} {row.part}: {hint}", row.place)
            for row in self._rows.values()
            if row.part not in self._met
        ]

    def _decides_about(self, ids: PartIds) -> bool:
        every = (ids.sample, *ids.targets, *ids.turns, *(part for boxes in ids.boxes for part in boxes))
        return not self._rows.keys().isdisjoint(every)

    def _dropped(self, part: str) -> bool:
        row = self._rows.get(part)
        if row:
            self._met.add(part)
        return row is not None and row.decision == "drop"

    def _changes(self, part: str) -> dict[str, Any]:
        return self._rows[part].changes if part in self._rows else {}

    def _who(self, part: str, what: str) -> str:
        return f"{what}: {self._rows[part].place}"

    def _target(
        self, target: Target, part: str, box_parts: tuple[str, ...], source: str, problems: list[Problem]
    ) -> Target | None:
        if self._dropped(part):
            detail = self._who(part, f"{target.phrase!r:.80} with {len(target.boxes_xyxy)} boxes")
            problems.append(Problem("target", "dropped_by_review", detail, source))
            return None
        changes = self._changes(part)
        phrase = changes.get("phrase", target.phrase)
        language = changes.get("language", None if "phrase" in changes else target.language)
        description = changes.get("description", target.description)
        if "boxes" in changes:
            boxes, num_found = list(changes["boxes"]), 0
        else:
            boxes, num_found = self._boxes(target, box_parts, source, problems), len(target.boxes_xyxy)
        try:
            return make_target(phrase, boxes, num_boxes_found=num_found, language=language, description=description)
        except Rejected as rejected:
            problems.append(rejected.problem(source))
            return None

    def _boxes(self, target: Target, parts: tuple[str, ...], source: str, problems: list[Problem]) -> list[Box]:
        boxes: list[Box] = []
        for box, part in zip(target.boxes_xyxy, parts, strict=True):
            if self._dropped(part):
                detail = self._who(part, f"box {list(box)} of {target.phrase!r:.80}")
                problems.append(Problem("box", "dropped_by_review", detail, source))
            else:
                boxes.extend(self._changes(part).get("boxes", (box,)))
        return boxes

    def _turn(self, turn: Turn, part: str, source: str, problems: list[Problem]) -> Turn | None:
        if self._dropped(part):
            detail = self._who(part, f"turn {turn.prompt!r:.80}")
            problems.append(Problem("turn", "dropped_by_review", detail, source))
            return None
        return replace(turn, **self._changes(part))


def load_decisions(path: Path) -> Decisions:
    """Load a file of decisions, JSON or (by its name) CSV. Raises DataError that names the row."""
    try:
        text = read_bytes(path, MAX_FILE_BYTES).decode("utf-8-sig")
    except OSError as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise DataError(f"{path}: {found}. {_ORIGIN}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}). {_ORIGIN}") from None
    rows = _csv_rows(text, path) if path.suffix.lower() == ".csv" else _json_rows(text, path)
    return Decisions([_decision(row, place) for place, row in rows])


def _json_rows(text: str, path: Path) -> list[tuple[str, Any]]:
    expected = 'expected {"decisions": [{"id": ..., "decision": ...}, ...]}'
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}; {expected} (CSV files end in .csv). {_ORIGIN}") from None
    rows = content.get("decisions") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise DataError(f'{path}: "decisions" is {rows!r:.80}, {expected}. {_ORIGIN}')
    return [(f"{path.name} decisions[{i}]", row) for i, row in enumerate(rows)]


def _csv_rows(text: str, path: Path) -> list[tuple[str, Any]]:
    """Read CSV. Empty cells are ignored; a list of boxes is JSON in its cell."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows = []
    try:
        for cells in reader:
            place = f"{path.name}:{reader.line_num}"
            if None in cells:
                raise DataError(f"{place} has more cells than columns: {cells[None]!r:.80}")
            row: dict[str, Any] = {name: cell for name, cell in cells.items() if cell}
            if "boxes" in row:
                row["boxes"] = _parse_cell(row["boxes"], place)
            rows.append((place, row))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} is not valid CSV: {error}") from None
    return rows


def _parse_cell(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{place}: boxes is {text!r:.80}; expected a list such as [[10, 20, 300, 400]]") from None


def _decision(row: Any, place: str) -> Decision:
    _require(isinstance(row, dict), place, "the row", row, 'an object with "id" and "decision"')
    name, decision = row.get("id"), row.get("decision")
    _require(isinstance(name, str), place, "id", name, "the id of a suspect, as the review shows it")
    part = name.partition(".")[0]  # the id of a suspect is that of its part, a dot and the kind of suspicion
    level, _, digest = part.partition("-")
    known = level in EDITABLE and len(digest) == 16 and set(digest) <= set("0123456789abcdef")
    _require(known, place, "id", name, "the id of a suspect, as the review shows it, such as box-0123456789abcdef")
    _require(decision in DECISIONS, place, "decision", decision, " or ".join(DECISIONS))
    given = {field: value for field, value in row.items() if field not in ("id", "decision", *_FOR_PEOPLE)}
    if decision != "edit":
        _require(not given, place, f"{decision} with", sorted(given), f"no new values; use {DECISIONS[2]} for them")
        return Decision(part, decision, {}, place)
    allowed = EDITABLE[level]
    _require(bool(allowed), place, "edit of", name, "a target, box or turn; a sample can be accepted or dropped")
    good_names = bool(given) and set(given) <= set(allowed)
    _require(good_names, place, "edit with", sorted(given), f"new values for {', '.join(allowed)}")
    return Decision(part, decision, {field: _new_value(field, given[field], level, place) for field in given}, place)


def _new_value(field: str, value: Any, level: str, place: str) -> Any:
    if field == "boxes":
        return _new_boxes(value, level, place)
    good = isinstance(value, str) and bool(value.strip())
    _require(good or (field == "description" and value is None), place, field, value, "a text")
    _check_text(value, place, field)
    _require(field != "language" or value in ("zh", "en"), place, field, value, '"zh" or "en"')
    return value if field in ("prompt", "answer") or value is None else value.strip()


def _new_boxes(value: Any, level: str, place: str) -> tuple[Box, ...]:
    good = isinstance(value, list) and (bool(value) or level == "target")
    _require(good, place, "boxes", value, "such as [[10, 20, 300, 400]]; use drop to remove a box")
    try:
        boxes = tuple(four_numbers(box, "[x0, y0, x1, y1]") for box in value)
    except Rejected as rejected:
        raise DataError(f"{place}: boxes: {rejected.detail}") from None
    for x0, y0, x1, y1 in boxes:
        _require(x0 < x1 and y0 < y1, place, "boxes", [x0, y0, x1, y1], "x0 < x1 and y0 < y1")
    return boxes


def _check_text(value: Any, place: str, field: str) -> None:
    try:
        check_text(value, "target")
    except Rejected as rejected:
        raise DataError(f"{place}: {field}: {rejected.detail}") from None


def _require(ok: bool, place: str, field: str, value: object, expected: str) -> None:
    if not ok:
        raise DataError(f"{place}: {field} {value!r:.80}; expected {expected}")
