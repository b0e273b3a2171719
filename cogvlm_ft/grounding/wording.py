"""The sentences around the boxes, in Chinese or English: loaded from YAML and checked. `turns` fills them in."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.grounding.templates import SAMPLE_BOXES, Slot, fill, read_sentence, read_templates
from cogvlm_ft.plain_files import read_bytes
from cogvlm_ft.yaml_text import MAX_BYTES, decode_yaml, parse_yaml

LANGUAGES = ("zh", "en")
WORDING_FILE = "wording.yaml"
"""File in a checkpoint or model folder with the wording that it was trained with."""
BOX_ORDERS = ("file", "left_to_right", "large_first")
MAX_BOXES, MAX_TARGETS = 50, 5

_LIMITS = ("max_boxes", "max_targets", "box_order")
_NOT_FOUND = {"zh": "未找到指定目标", "en": "The specified target was not found."}
_MORE = {"zh": "（共{count}处，只列出{shown}处）", "en": " ({count} in all, {shown} of them listed)"}

_ASK = Slot(("phrase",), ("not_found",))
_TELL = Slot(("boxes",), ("phrase", "count", "description", "more"), boxes="boxes")
_ASK_ALL = Slot((), ("phrases", "not_found"))
# Style -> the keys of a language that are lists of texts. "lines" comes before the answers that contain them.
_STYLES: dict[str, dict[str, Slot]] = {
    "refer": {"prompts": _ASK, "answers": _TELL},
    "detect": {"prompts": _ASK, "answers": _TELL},
    "describe": {
        "prompts": Slot(("boxes",), ("phrase",), boxes="boxes"),
        "answers": Slot(("description",), ("phrase",)),
    },
    "steps": {
        "prompts": _ASK_ALL,
        "lines": Slot(("boxes",), ("phrase", "count", "description", "number"), boxes="boxes"),
        "answers": Slot(("lines",), ("phrases", "count", "more"), boxes="lines"),
    },
    "conversation": {
        "first_prompts": _ASK_ALL,
        "first_answers": Slot(("phrases",), ("count",)),
        "prompts": _ASK,
        "answers": _TELL,
    },
}


@dataclass(frozen=True)
class LanguageWording:
    """The sentences of one language, with the placeholders listed in `_STYLES`.

    not_found: the whole answer when the target is absent.
    lines: of a step-wise answer, one per target. first_prompts, first_answers: the first turn of a conversation.
    more: the note that a list of boxes was cut.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    not_found: str
    lines: tuple[str, ...] = ()
    first_prompts: tuple[str, ...] = ()
    first_answers: tuple[str, ...] = ()
    more: str = ""


@dataclass(frozen=True)
class Wording:
    """The form of questions and answers.

    languages: by "zh", "en"; empty for a mix.
    style: "refer" (one turn per target), "detect" (the same, with targets of one phrase merged), "describe" (box ->
        description), "steps" (one answer for several targets) or "conversation" (the same in several turns).
    max_boxes: the most boxes in one answer, or in the answers of one conversation.
    max_targets: the most targets of one step-wise answer or conversation; the others get their own.
    box_order: one of BOX_ORDERS.
    mix: the wordings of which one is drawn for every image, in proportion to their `weight`.
    """

    name: str
    languages: Mapping[str, LanguageWording]
    style: str = "refer"
    max_boxes: int = MAX_BOXES
    max_targets: int = MAX_TARGETS
    box_order: str = "file"
    weight: float = 1.0
    mix: tuple[Wording, ...] = ()

    @property
    def not_found_sentences(self) -> tuple[str, ...]:
        """The not-found sentences of every language, for scoring."""
        own = [language.not_found for language in self.languages.values()]
        return tuple(dict.fromkeys([*own, *(text for part in self.mix for text in part.not_found_sentences)]))


def load_wording(name_or_path: str | Path) -> Wording:
    """Load a built-in wording by name, or a YAML file of the same form; raises ConfigError."""
    content, folder = _load_yaml(name_or_path, Path())
    return _build_wording(content, str(name_or_path), folder)


def save_wording(wording: Wording, path: Path) -> None:
    """Write a wording as one file, from which load_wording builds the same; a mix with all its parts."""
    content = {"name": Path(wording.name).name} | _content_of(wording)  # not its folder, which is of this machine
    text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False, width=1000)
    path.write_text(text, encoding="utf-8")


def _content_of(wording: Wording) -> dict[str, Any]:
    default = Wording("", {})
    limits = {key: getattr(wording, key) for key in _LIMITS if getattr(wording, key) != getattr(default, key)}
    if wording.mix:
        parts = [{"wording": _content_of(part), "weight": part.weight} for part in wording.mix]
        return {**limits, "mix": parts}
    texts = {language: _language_content(wording, language) for language in wording.languages}
    return {"style": wording.style, **limits, **texts}


def _language_content(wording: Wording, language: str) -> dict[str, Any]:
    sentences = wording.languages[language]
    slots = {key: list(getattr(sentences, key)) for key in _STYLES[wording.style]}
    return {**slots, "not_found": sentences.not_found, "more": sentences.more}


def _load_yaml(name_or_path: str | Path, folder: Path) -> tuple[Any, Path]:
    """Load a built-in wording, or a file relative to `folder`; return its content and folder."""
    built_in_folder = resources.files("cogvlm_ft.grounding") / "wordings"
    built_in = {file.name.removesuffix(".yaml"): file for file in built_in_folder.iterdir()}
    path = folder / Path(name_or_path).expanduser()
    if name_or_path in built_in:
        raw = built_in[str(name_or_path)].read_bytes()
    elif path.is_file():
        raw = read_bytes(path, MAX_BYTES)
    elif (packaged := resources.files("cogvlm_ft") / str(name_or_path)).is_file():  # configs/demo_wording.yaml
        raw = packaged.read_bytes()
    else:
        names = ", ".join(sorted(built_in))
        raise ConfigError(f"wording {name_or_path}: neither built in ({names}) nor an existing YAML file")
    try:
        return parse_yaml(decode_yaml(raw)), path.parent
    except ValueError as error:
        raise ConfigError(f"wording {name_or_path}: not readable as YAML: {error}") from error


def _build_wording(content: Any, name: str, folder: Path | None) -> Wording:
    """Build a wording from the content of its file.

    folder: of the files of a mix; None inside a mix, which cannot contain another one.
    """
    place = f"wording {name}"
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{place}: found {content!r:.200}; expected the keys {' and/or '.join(LANGUAGES)}, or mix")
    if "mix" in content:
        if folder is None:
            raise ConfigError(
                f"{place}: this is a mix itself; expected a single wording. List its parts in the outer mix"
            )
        return _build_mix(content, name, folder)
    _check_keys(content, allowed=(*LANGUAGES, "style", *_LIMITS, "name"), place=place)
    style = content.get("style", "refer")
    _require(isinstance(style, str) and style in _STYLES, f"{place}.style", style, f"one of {', '.join(_STYLES)}")
    found = [language for language in content if language in LANGUAGES]
    if not found:
        raise ConfigError(f"{place}: found {', '.join(content)}; expected also {' and/or '.join(LANGUAGES)}")
    languages = {language: _build_language(content[language], place, language, style) for language in found}
    return replace(Wording(_read_name(content, name, place), languages, style), **_read_limits(content, place))


def _build_mix(content: dict[Any, Any], name: str, folder: Path) -> Wording:
    """Build a mix; the limits next to it apply to all its parts."""
    place = f"wording {name}"
    _check_keys(content, allowed=("mix", *_LIMITS, "name"), place=place)
    limits = _read_limits(content, place)
    entries = content["mix"]
    _require(isinstance(entries, list) and bool(entries), f"{place}.mix", entries, "a list of wordings")
    parts = []
    for number, entry in enumerate(entries, 1):
        part = _build_part(entry, f"{name}, mix {number}", folder)
        parts.append(replace(part, **limits))
    for part in parts:
        if set(part.languages) != set(parts[0].languages):
            raise ConfigError(
                f"{place}: {parts[0].name} has {', '.join(parts[0].languages)}, {part.name} has"
                f" {', '.join(part.languages)}; expected the same languages in all parts of a mix"
            )
    return Wording(_read_name(content, name, place), {}, mix=tuple(parts), **limits)


def _read_name(content: dict[Any, Any], name: str, place: str) -> str:
    """Return the name in the content, which a saved wording has; else that of the file."""
    found = content.get("name", name)
    _require(isinstance(found, str) and bool(found.strip()), f"{place}.name", found, "a text")
    return found


def _build_part(entry: Any, name: str, folder: Path) -> Wording:
    """Build one entry of a mix: a wording (name, path or the content of a file), or {wording: ..., weight: ...}."""
    wording, weight = entry, 1.0
    if isinstance(entry, dict) and "wording" in entry:
        _check_keys(entry, allowed=("wording", "weight"), place=f"wording {name}")
        wording, weight = entry["wording"], entry.get("weight", 1.0)
    good = isinstance(weight, (int, float)) and not isinstance(weight, bool) and weight > 0 and math.isfinite(weight)
    _require(good, f"wording {name}.weight", weight, "a number above 0")
    if isinstance(wording, str):
        name = f"{name} ({wording})"
        wording, _ = _load_yaml(wording, folder)
    return replace(_build_wording(wording, name, None), weight=float(weight))


def _read_limits(content: dict[Any, Any], place: str) -> dict[str, Any]:
    """Return max_boxes, max_targets and box_order as far as they are given."""
    limits = {key: content[key] for key in _LIMITS if key in content}
    for key, value in limits.items():
        if key == "box_order":
            _require(value in BOX_ORDERS, f"{place}.{key}", value, f"one of {', '.join(BOX_ORDERS)}")
        else:
            _require(type(value) is int and value >= 1, f"{place}.{key}", value, "an integer of at least 1")
    return limits


def _build_language(content: Any, place: str, language: str, style: str) -> LanguageWording:
    slots, place = _STYLES[style], f"{place}, {language}"
    keys = (*slots, "not_found")
    if not isinstance(content, dict):
        raise ConfigError(f"{place}: found {content!r:.200}; expected the keys {', '.join(keys)}")
    _check_keys(content, allowed=(*keys, "more"), place=f"{place} (style {style})")
    content = {"more": _MORE[language]} | content
    if style == "describe":  # asks about present targets only
        content = {"not_found": _NOT_FOUND[language]} | content
    missing = [key for key in keys if key not in content]
    if missing:
        raise ConfigError(f"{place}: {', '.join(missing)} missing; expected {', '.join(keys)} for style {style}")
    texts: dict[str, tuple[str, ...]] = {}
    for key, slot in slots.items():
        sample = _sample_lines(texts["lines"]) if slot.boxes == "lines" else SAMPLE_BOXES
        texts[key] = read_templates(content[key], f"{place}.{key}", slot, sample)
    not_found = read_sentence(content["not_found"], f"{place}.not_found").strip()
    more = read_sentence(content["more"], f"{place}.more", ("count", "shown"))
    return LanguageWording(not_found=not_found, more=more, **texts)


def _sample_lines(lines: Collection[str]) -> str:
    """Fill every template of a line with sample values."""
    values = dict.fromkeys(("phrase", "count", "description", "number"), "x") | {"boxes": SAMPLE_BOXES}
    return "\n".join(fill(line, values) for line in lines)


def _check_keys(content: dict[Any, Any], *, allowed: Collection[str], place: str) -> None:
    unknown = [str(key) for key in content if key not in allowed]
    if unknown:
        raise ConfigError(f"{place}: unknown key {', '.join(unknown)}; expected one of {', '.join(allowed)}")


def _require(ok: bool, place: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{place}: found {value!r:.200}; expected {expected}")
