"""Candidates as JSON, for the temporary files of a build."""

from __future__ import annotations

import json
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from cogvlm_ft.grounding.targets import Target, Turn
from cogvlm_ft.shards.packing.candidates import Candidate, Problem


def _fields(value: object) -> Any:
    if is_dataclass(value):
        return vars(value)
    assert isinstance(value, Path)
    return str(value)


to_json = json.JSONEncoder(default=_fields).encode
"""Convert a candidate, or a list with problems, to one line of JSON."""


def candidate_from_json(text: str) -> Candidate:
    """Restore a candidate from JSON, which has neither tuples nor paths."""
    fields = json.loads(text)
    size, embedded_in = fields["stated_size_px"], fields["embedded_in"]
    fields["targets"] = tuple(_target(target) for target in fields["targets"])
    fields["turns"] = tuple(_turn(turn) for turn in fields["turns"])
    fields["problems"] = tuple(Problem(**problem) for problem in fields["problems"])
    fields["stated_size_px"] = size if size is None else tuple(size)
    fields["embedded_in"] = embedded_in if embedded_in is None else Path(embedded_in)
    return Candidate(**fields)


def _target(fields: dict[str, Any]) -> Target:
    fields["boxes_xyxy"] = tuple(tuple(box) for box in fields["boxes_xyxy"])
    fields["names"] = tuple((language, words) for language, words in fields["names"])
    return Target(**fields)


def _turn(fields: dict[str, Any]) -> Turn:
    fields["target"] = fields["target"] and _target(fields["target"])
    fields["history"] = tuple((prompt, answer) for prompt, answer in fields["history"])
    return Turn(**fields)
