"""Texts with placeholders in braces, such as `{phrase}在哪里?`. A brace that is meant is written twice: `{{`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.grounding.boxes import parse_boxes

# A doubled brace, a placeholder, or (always a mistake) a single brace.
_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")

SAMPLE_BOXES = "[[012,345,678,901;000,000,999,999]]"
_SAMPLE_TEXT = "x"


@dataclass(frozen=True)
class Slot:
    """What a text of one key of a wording file may hold.

    boxes: the placeholder that brings the boxes, if any: what is rendered must read back as the very same boxes.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    boxes: str | None = None


def placeholders(template: str) -> set[str]:
    """The names in braces."""
    return {match[1] for match in _TOKEN.finditer(template) if match[1] is not None}


def fill(template: str, values: Mapping[str, str]) -> str:
    """Put the values in, in one pass: braces inside a value stay as they are."""
    return _TOKEN.sub(lambda match: match[0][0] if match[1] is None else values[match[1]], template)


def read_templates(content: Any, place: str, slot: Slot, sample_boxes: str = SAMPLE_BOXES) -> tuple[str, ...]:
    """The texts of one key, checked.

    place: file, language and key, for messages. sample_boxes: what stands for the placeholder `slot.boxes`. Raises
    ConfigError.
    """
    if not isinstance(content, list) or not content:
        raise ConfigError(f"{place}: found {content!r:.200}, wanted a list with at least one text")
    for number, template in enumerate(content, 1):
        where = f"{place}, text {number}"
        _check_placeholders(template, where, slot)
        if slot.boxes:
            _check_reads_back(template, where, slot, sample_boxes)
    return tuple(content)


def read_sentence(content: Any, place: str, allowed: Collection[str] = ()) -> str:
    """A text that stands alone, without boxes. Raises ConfigError."""
    if not isinstance(content, str) or not content.strip():
        hint = "in YAML no, yes, on and numbers need quotes"
        raise ConfigError(f"{place}: found {content!r:.200}, wanted a sentence ({hint})")
    known = f"without other placeholders than {_names(allowed)}" if allowed else "without placeholders"
    if _unknown(content, allowed) or "[[" in content or (not allowed and re.search("[{}]", content)):
        raise ConfigError(f"{place}: {content!r} must be a plain sentence, {known} and without double brackets")
    return content


def _check_placeholders(template: Any, place: str, slot: Slot) -> None:
    if not isinstance(template, str):
        raise ConfigError(
            f"{place}: found {template!r:.200}, wanted a text; in YAML a brace at its start needs quotes around it"
        )
    if not template.strip():
        raise ConfigError(f"{place}: found an empty text")
    unknown = _unknown(template, slot.required + slot.optional)
    if unknown:
        raise ConfigError(
            f"{place}: {template!r} has a brace that is no known placeholder: {', '.join(unknown)}; known here are"
            f" {_names(slot.required + slot.optional)}, and a brace that is meant is written twice"
        )
    missing = [name for name in slot.required if name not in placeholders(template)]
    if missing:
        raise ConfigError(f"{place}: {template!r} lacks {_names(missing)}")


def _unknown(template: str, allowed: Collection[str]) -> list[str]:
    """What is in braces, or a single brace, and should not be."""
    single = [match[0] for match in _TOKEN.finditer(template) if match[0] in ("{", "}")]
    return single + [f"{{{name}}}" for name in sorted(placeholders(template) - set(allowed))]


def _check_reads_back(template: str, place: str, slot: Slot, sample_boxes: str) -> None:
    """Twice in a row, because what follows a text (another line, a note) must not spoil its boxes either."""
    values = dict.fromkeys((*slot.required, *slot.optional), _SAMPLE_TEXT) | {str(slot.boxes): sample_boxes}
    for more in ("", _SAMPLE_TEXT):
        once = fill(template, values | {"more": more})
        wanted = parse_boxes(sample_boxes) or []
        if parse_boxes(once) != wanted or parse_boxes(f"{once}\n{once}") != wanted + wanted:
            raise ConfigError(
                f"{place}: {template!r} must hold {{{slot.boxes}}} once and no other double brackets: it gives"
                f" {once!r:.200}, which reads back as {parse_boxes(once) or 'no boxes'}, wanted {wanted}"
            )


def _names(names: Collection[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in sorted(names))
