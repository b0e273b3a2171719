"""Texts with placeholders in braces, such as `{phrase}在哪里?`. A literal brace is doubled: `{{`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.grounding.boxes import parse_boxes

# A doubled brace, a placeholder, or a single brace, which is always an error.
_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")

SAMPLE_BOXES = "[[012,345,678,901;000,000,999,999]]"
_SAMPLE_TEXT = "x"


@dataclass(frozen=True)
class Slot:
    """The placeholders of one key of a wording file.

    boxes: the placeholder for the boxes, if any: the rendered text must parse back to exactly the same boxes.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    boxes: str | None = None


def placeholders(template: str) -> set[str]:
    """Return the names in braces."""
    return {match[1] for match in _TOKEN.finditer(template) if match[1] is not None}


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replace the placeholders in one pass: braces inside a value stay as they are."""
    return _TOKEN.sub(lambda match: match[0][0] if match[1] is None else values[match[1]], template)


def read_templates(content: Any, place: str, slot: Slot, sample_boxes: str = SAMPLE_BOXES) -> tuple[str, ...]:
    """Check the texts of one key and return them; raise ConfigError.

    place: file, language and key, for messages. sample_boxes: a value for the placeholder `slot.boxes`.
    """
    if not isinstance(content, list) or not content:
        raise ConfigError(f"{place}: found {content!r:.200}; expected a list with at least one text")
    for number, template in enumerate(content, 1):
        where = f"{place}, text {number}"
        _check_placeholders(template, where, slot)
        if slot.boxes:
            _check_reads_back(template, where, slot, sample_boxes)
    return tuple(content)


def read_sentence(content: Any, place: str, allowed: Collection[str] = ()) -> str:
    """Check a text that is used alone, without boxes, and return it; raise ConfigError."""
    if not isinstance(content, str) or not content.strip():
        hint = "in YAML, quote no, yes, on and numbers"
        raise ConfigError(f"{place}: found {content!r:.200}; expected a sentence ({hint})")
    rule = f"with no placeholders except {_names(allowed)}" if allowed else "without placeholders"
    if _unknown(content, allowed) or "[[" in content or (not allowed and re.search("[{}]", content)):
        raise ConfigError(f"{place}: found {content!r}; expected a plain sentence {rule} and without double brackets")
    return content


def _check_placeholders(template: Any, place: str, slot: Slot) -> None:
    if not isinstance(template, str):
        raise ConfigError(
            f"{place}: found {template!r:.200}; expected a text. In YAML, quote a text that starts with a brace"
        )
    if not template.strip():
        raise ConfigError(f"{place}: found an empty text; expected words")
    unknown = _unknown(template, slot.required + slot.optional)
    if unknown:
        raise ConfigError(
            f"{place}: {template!r} has an unknown placeholder or a single brace: {', '.join(unknown)}; expected only"
            f" {_names(slot.required + slot.optional)}. Double a literal brace"
        )
    missing = [name for name in slot.required if name not in placeholders(template)]
    if missing:
        raise ConfigError(f"{place}: {template!r} has no {_names(missing)}; expected it in every text")


def _unknown(template: str, allowed: Collection[str]) -> list[str]:
    """Return the unknown placeholders and the single braces."""
    single = [match[0] for match in _TOKEN.finditer(template) if match[0] in ("{", "}")]
    return single + [f"{{{name}}}" for name in sorted(placeholders(template) - set(allowed))]


def _check_reads_back(template: str, place: str, slot: Slot, sample_boxes: str) -> None:
    """Check that the boxes parse back, also twice in a row: following text (a line, a note) must not change them."""
    values = dict.fromkeys((*slot.required, *slot.optional), _SAMPLE_TEXT) | {str(slot.boxes): sample_boxes}
    for more in ("", _SAMPLE_TEXT):
        once = fill(template, values | {"more": more})
        expected = parse_boxes(sample_boxes) or []
        if parse_boxes(once) != expected or parse_boxes(f"{once}\n{once}") != expected + expected:
            raise ConfigError(
                f"{place}: {template!r} becomes {once!r:.200}, which reads back as {parse_boxes(once) or 'no boxes'};"
                f" expected {expected}. Use {{{slot.boxes}}} once and no other double brackets"
            )


def _names(names: Collection[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in sorted(names))
