"""Annotation files, and what a format reads from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvlm_ft.grounding.targets import Box, Turn
from cogvlm_ft.shards.packing.candidates import Candidate, Problem

Read = Callable[[Path, Path], Iterator[Candidate | Problem]]


@dataclass(frozen=True)
class Reading:
    """Everything that a format found."""

    candidates: list[Candidate]
    problems: list[Problem]

    @property
    def only(self) -> Candidate:
        assert len(self.candidates) == 1, self.candidates
        return self.candidates[0]

    @property
    def boxes(self) -> dict[str, dict[str, tuple[Box, ...]]]:
        """By image and phrase; every phrase is there once."""
        found = {}
        for candidate in self.candidates:
            assert candidate.image not in found
            found[candidate.image] = {target.phrase: target.boxes_xyxy for target in candidate.targets}
            assert len(found[candidate.image]) == len(candidate.targets)
        return found

    @property
    def turns(self) -> list[Turn]:
        return [turn for candidate in self.candidates for turn in candidate.turns]

    @property
    def reasons(self) -> list[tuple[str, str]]:
        return [(problem.level, problem.reason) for problem in self.problems]


def read_all(read: Read, annotations: Path, images: Path | None = None) -> Reading:
    parts = list(read(annotations, images or annotations.parent))
    candidates = [part for part in parts if isinstance(part, Candidate)]
    problems = [part for part in parts if isinstance(part, Problem)]
    problems += [problem for candidate in candidates for problem in candidate.problems]
    return Reading(candidates, problems)


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_lines(path: Path, lines: list[Any]) -> Path:
    raw = [line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path
