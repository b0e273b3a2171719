"""The words around the boxes: from targets to questions and answers, in Chinese or English."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.grounding.boxes import bins_from_box, format_boxes, parse_boxes
from cogvlm_ft.grounding.targets import Target, Turn

LANGUAGES = ("zh", "en")

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_IN_PROMPTS = {"phrase"}
_IN_ANSWERS = {"boxes", "phrase", "count", "description"}
_SAMPLE_BOXES = "[[012,345,678,901]]"


@dataclass(frozen=True)
class LanguageWording:
    """The sentences of one language, each holding placeholders.

    prompts: with `{phrase}`.
    answers: with `{boxes}`; may have `{phrase}`, `{count}` (of boxes), `{description}` (the phrase if there is none).
    not_found: the whole answer when the thing is not in the picture.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    not_found: str


@dataclass(frozen=True)
class Wording:
    """How questions and answers are put, by language ("zh", "en")."""

    name: str
    languages: Mapping[str, LanguageWording]

    @property
    def not_found_sentences(self) -> tuple[str, ...]:
        """The not-found sentence of every language, for scoring."""
        return tuple(language.not_found for language in self.languages.values())


def load_wording(name_or_path: str | Path) -> Wording:
    """Load a built-in wording by name, or a YAML file of the same form; raises ConfigError."""
    folder = resources.files("cogvlm_ft.grounding") / "wordings"
    built_in = {file.name.removesuffix(".yaml"): file for file in folder.iterdir() if file.name.endswith(".yaml")}
    if name_or_path in built_in:
        raw = built_in[str(name_or_path)].read_bytes()
    elif Path(name_or_path).is_file():
        raw = Path(name_or_path).read_bytes()
    else:
        names = ", ".join(sorted(built_in))
        raise ConfigError(f"wording {name_or_path}: neither built in ({names}) nor a YAML file that exists")
    try:
        content = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ConfigError(f"wording {name_or_path}: not readable as YAML: {error}") from error
    return _build_wording(content, str(name_or_path))


def build_turns(
    targets: Sequence[Target], image_size_px: tuple[int, int], wording: Wording, *, seed: int, epoch: int, key: str
) -> list[Turn]:
    """One turn per target, in an order and a wording that depend on (seed, epoch, key) only.

    key: names the sample. Raises ConfigError when the wording lacks a target's language, DataError when a phrase or
    description breaks the box text.
    """
    rng = random.Random(f"{seed}:{epoch}:{key}")
    shuffled = list(targets)
    rng.shuffle(shuffled)
    return [_build_turn(target, image_size_px, wording, rng, key) for target in shuffled]


def _build_turn(target: Target, image_size_px: tuple[int, int], wording: Wording, rng: random.Random, key: str) -> Turn:
    sentences = wording.languages.get(target.language)
    if sentences is None:
        raise ConfigError(
            f"wording {wording.name} has {', '.join(wording.languages)}, but sample {key} has a target in"
            f" {target.language!r} ({target.phrase!r}): add this language to the wording or drop such targets"
        )
    prompt = _fill(rng.choice(sentences.prompts), {"phrase": target.phrase})
    answer_template = rng.choice(sentences.answers)
    if not target.boxes_xyxy:
        return Turn(prompt, sentences.not_found, target)
    values = {
        "boxes": format_boxes(target.boxes_xyxy, image_size_px),
        "phrase": target.phrase,
        "count": str(len(target.boxes_xyxy)),
        "description": target.description or target.phrase,
    }
    answer = _fill(answer_template, values)
    if parse_boxes(answer) != [bins_from_box(box, image_size_px) for box in target.boxes_xyxy]:
        raise DataError(
            f"sample {key}: the answer {answer!r} does not read back as the boxes of {target.phrase!r}:"
            " take the double brackets out of its phrase and description"
        )
    return Turn(prompt, answer, target)


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Put the values in, in one pass: braces inside a value stay as they are."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def _build_wording(content: Any, name: str) -> Wording:
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"wording {name}: found {content!r}, wanted the keys {' and/or '.join(LANGUAGES)}")
    _check_keys(content, allowed=LANGUAGES, place=f"wording {name}")
    languages = {language: _build_language(content[language], f"wording {name}, {language}") for language in content}
    return Wording(name, languages)


def _build_language(content: Any, place: str) -> LanguageWording:
    wanted = ("prompts", "answers", "not_found")
    if not isinstance(content, dict):
        raise ConfigError(f"{place}: found {content!r}, wanted the keys {', '.join(wanted)}")
    _check_keys(content, allowed=wanted, place=place)
    missing = [key for key in wanted if key not in content]
    if missing:
        raise ConfigError(f"{place}: {', '.join(missing)} missing; wanted are {', '.join(wanted)}")
    prompts = _read_templates(content["prompts"], f"{place}.prompts", required="phrase", allowed=_IN_PROMPTS)
    answers = _read_templates(content["answers"], f"{place}.answers", required="boxes", allowed=_IN_ANSWERS)
    return LanguageWording(prompts, answers, _read_not_found(content["not_found"], f"{place}.not_found"))


def _check_keys(content: dict[Any, Any], *, allowed: Collection[str], place: str) -> None:
    unknown = [str(key) for key in content if key not in allowed]
    if unknown:
        raise ConfigError(f"{place}: unknown key {', '.join(unknown)}; known are {', '.join(allowed)}")


def _read_templates(content: Any, place: str, *, required: str, allowed: Collection[str]) -> tuple[str, ...]:
    if not isinstance(content, list) or not content:
        raise ConfigError(f"{place}: found {content!r}, wanted a list with at least one text")
    for number, template in enumerate(content, 1):
        _check_template(template, f"{place}, text {number}", required, allowed)
    return tuple(content)


def _check_template(template: Any, place: str, required: str, allowed: Collection[str]) -> None:
    if not isinstance(template, str):
        raise ConfigError(
            f"{place}: found {template!r}, wanted a text; in YAML a brace at its start needs quotes around it"
        )
    unknown = set(_PLACEHOLDER.findall(template)) - set(allowed)
    if unknown or re.search(r"[{}]", _PLACEHOLDER.sub("", template)):
        known = ", ".join(f"{{{name}}}" for name in sorted(allowed))
        raise ConfigError(f"{place}: {template!r} has a brace that is no known placeholder; known here are {known}")
    if f"{{{required}}}" not in template:
        raise ConfigError(f"{place}: {template!r} lacks {{{required}}}")
    if required == "boxes":
        sample = _fill(template, {name: "" for name in allowed} | {"boxes": _SAMPLE_BOXES})
        if parse_boxes(sample) != parse_boxes(_SAMPLE_BOXES):
            raise ConfigError(f"{place}: {template!r} must hold {{boxes}} once and no other double brackets")


def _read_not_found(content: Any, place: str) -> str:
    if not isinstance(content, str) or not content.strip():
        raise ConfigError(f"{place}: found {content!r}, wanted a sentence")
    if re.search(r"[{}]|\[\[", content):
        raise ConfigError(f"{place}: {content!r} must be a plain sentence, without placeholders and double brackets")
    return content.strip()
