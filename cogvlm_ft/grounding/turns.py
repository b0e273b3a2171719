"""Build questions and answers from targets; the same seed, epoch and key always give the same turns."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.grounding.boxes import bins_from_box, format_boxes, parse_boxes
from cogvlm_ft.grounding.targets import Box, Target, Turn
from cogvlm_ft.grounding.templates import fill, placeholders
from cogvlm_ft.grounding.wording import LanguageWording, Wording

_AND = {"zh": "、", "en": ", "}  # between the phrases of several targets


def build_turns(
    targets: Sequence[Target],
    image_size_px: tuple[int, int],
    wording: Wording,
    *,
    seed: int,
    epoch: int,
    key: str,
    in_order: bool = False,
) -> list[Turn]:
    """Build the turns about one image, in an order and a wording that depend on (seed, epoch, key) only.

    key: the name of the sample. in_order: keep the order of the targets. A wording that describes boxes leaves absent
    targets out, so there may be no turns. Raises ConfigError when the wording lacks a target's language, DataError when
    a phrase or description breaks the box text.
    """
    rng = random.Random(f"{seed}:{epoch}:{key}")
    part = _choose_part(wording, targets, rng)
    targets = _with_names(targets, part, rng)
    return [replace(turn, style=part.style) for turn in _Image(key, image_size_px, part, rng, in_order).turns(targets)]


def most_turns(num_targets: int, wording: Wording) -> int:
    """Return an upper bound for the number of turns that `build_turns` makes of `num_targets` targets."""
    if wording.mix:
        return max(most_turns(num_targets, part) for part in wording.mix)
    if wording.style not in ("steps", "conversation"):
        return num_targets
    num_languages = min(len(wording.languages), num_targets)  # each has groups of its own
    num_groups = num_languages + (num_targets - num_languages) // group_size(wording)
    return num_groups if wording.style == "steps" else num_groups + num_targets


def group_size(wording: Wording) -> int:
    """Return how many targets a step-wise answer or a conversation is about: each must have at least one box left."""
    return min(wording.max_targets, wording.max_boxes)


def merge_targets(targets: Sequence[Target]) -> list[Target]:
    """Merge targets of one phrase and language, with all their boxes; keep a description if there is only one."""
    same: dict[tuple[str, str], list[Target]] = {}
    for target in targets:
        same.setdefault((target.phrase, target.language), []).append(target)
    return [_merge(group) if len(group) > 1 else group[0] for group in same.values()]


def _merge(targets: Sequence[Target]) -> Target:
    boxes = tuple(dict.fromkeys(box for target in targets for box in target.boxes_xyxy))
    descriptions = {target.description for target in targets if target.description}
    return replace(targets[0], boxes_xyxy=boxes, description=descriptions.pop() if len(descriptions) == 1 else None)


def _choose_part(wording: Wording, targets: Sequence[Target], rng: random.Random) -> Wording:
    """Draw a part of a mix; one that describes boxes only if a target has some."""
    if not wording.mix:
        return wording
    parts = [part for part in wording.mix if part.style != "describe" or any(t.boxes_xyxy for t in targets)]
    parts = parts or list(wording.mix)
    return rng.choices(parts, [part.weight for part in parts])[0]


def _with_names(targets: Sequence[Target], wording: Wording, rng: random.Random) -> list[Target]:
    """Replace labels that have names by one of them, all in one language as far as possible."""
    named = {language for target in targets for language, _ in target.names}
    languages = [language for language in wording.languages if language in named]
    chosen = rng.choice(languages) if languages else None
    return [_with_name(target, chosen, wording, rng) if target.names else target for target in targets]


def _with_name(target: Target, language: str | None, wording: Wording, rng: random.Random) -> Target:
    names = [name for name in target.names if name[0] == language]
    names = names or [name for name in target.names if name[0] in wording.languages] or list(target.names)
    language, phrase = rng.choice(names)
    return replace(target, phrase=phrase, language=language, names=())


@dataclass(frozen=True)
class _Image:
    """What every turn about one image shares."""

    key: str
    size_px: tuple[int, int]
    wording: Wording
    rng: random.Random
    in_order: bool = False

    def turns(self, targets: Sequence[Target]) -> list[Turn]:
        style = self.wording.style
        if style == "steps":
            return [turn for asked in _by_language(targets) for turn in self._steps(asked)]
        if style == "conversation":
            return [turn for asked in _by_language(targets) for turn in self._conversations(asked)]
        if style == "describe":
            return [self._describe(target) for target in self._shuffled(targets) if target.boxes_xyxy]
        asked = merge_targets(targets) if style == "detect" else targets
        return [self._refer(target, self._shown(target)) for target in self._shuffled(asked)]

    def _refer(self, target: Target, shown: Sequence[Box]) -> Turn:
        """Build a turn from phrase to boxes."""
        sentences = self._sentences(target)
        prompt = fill(self.rng.choice(sentences.prompts), {"phrase": target.phrase, "not_found": sentences.not_found})
        template = self.rng.choice(sentences.answers)
        if not target.boxes_xyxy:
            return Turn(prompt, sentences.not_found, target)
        num_boxes = len(target.boxes_xyxy)
        answer = _fill_answer(template, self._values(target, shown), _note(sentences, num_boxes, len(shown)))
        self._check_reads_back(answer, shown, target.phrase)
        return Turn(prompt, answer, target, num_cut_boxes=num_boxes - len(shown))

    def _describe(self, target: Target) -> Turn:
        """Build a turn from boxes to description."""
        sentences = self._sentences(target)
        shown = self._shown(target)
        values = self._values(target, shown)
        prompt = fill(self.rng.choice(sentences.prompts), values)
        self._check_reads_back(prompt, shown, target.phrase)
        answer = fill(self.rng.choice(sentences.answers), values)
        return Turn(prompt, answer, target, scored=False, num_cut_boxes=len(target.boxes_xyxy) - len(shown))

    def _steps(self, targets: list[Target]) -> list[Turn]:
        """Build turns that answer for several targets: how many and what, then a line for each.

        A question that names no phrases is about everything in the image, so absent targets are not part of it.
        """
        template = self.rng.choice(self._sentences(targets[0]).prompts)
        if "phrases" in placeholders(template):
            return [self._step_wise(template, group, group) for group in self._groups(self._shuffled(targets))]
        present = [target for target in targets if target.boxes_xyxy]
        return [self._step_wise(template, present or targets, present[: group_size(self.wording)])]

    def _step_wise(self, template: str, asked: Sequence[Target], lined: Sequence[Target]) -> Turn:
        """Build one step-wise turn.

        asked: the targets of the question. lined: those of them that get a line.
        """
        sentences, together = self._sentences(asked[0]), _together(asked)
        prompt = fill(template, {"phrases": together.phrase, "not_found": sentences.not_found})
        answer, line = self.rng.choice(sentences.answers), self.rng.choice(sentences.lines)
        if not together.boxes_xyxy:
            return Turn(prompt, sentences.not_found, together)
        lists = self._divided_boxes(lined)
        values = [self._values(target, shown) for target, shown in zip(lined, lists, strict=True)]
        lines = [fill(line, {**value, "number": str(number)}) for number, value in enumerate(values, 1)]
        all_shown = [box for shown in lists for box in shown]
        num_boxes = len(together.boxes_xyxy)
        found = {"phrases": _join(asked, present=True), "count": str(num_boxes), "lines": "\n".join(lines)}
        text = _fill_answer(answer, found, _note(sentences, num_boxes, len(all_shown)))
        self._check_reads_back(text, all_shown, together.phrase)
        return Turn(prompt, text, together, num_cut_boxes=num_boxes - len(all_shown))

    def _conversations(self, targets: list[Target]) -> list[Turn]:
        """Build conversations: first how many and what, then one turn per target, with those before it as history."""
        turns: list[Turn] = []
        for group in self._groups(self._shuffled(targets)):
            sentences = self._sentences(group[0])
            template = self.rng.choice(sentences.first_prompts)
            conversation = [self._first(template, group if "phrases" in placeholders(template) else targets)]
            for target, shown in zip(group, self._divided_boxes(group), strict=True):
                history = tuple((turn.prompt, turn.answer) for turn in conversation)
                conversation.append(replace(self._refer(target, shown), history=history))
            turns += conversation
        return turns

    def _first(self, template: str, asked: Sequence[Target]) -> Turn:
        """Build the first turn of a conversation, which has no box in its answer."""
        sentences, together = self._sentences(asked[0]), _together(asked)
        prompt = fill(template, {"phrases": together.phrase, "not_found": sentences.not_found})
        answer = self.rng.choice(sentences.first_answers)
        if not together.boxes_xyxy:
            return Turn(prompt, sentences.not_found, together)
        found = {"phrases": _join(asked, present=True), "count": str(len(together.boxes_xyxy))}
        return Turn(prompt, fill(answer, found), together, scored=False)

    def _sentences(self, target: Target) -> LanguageWording:
        sentences = self.wording.languages.get(target.language)
        if sentences is None:
            raise ConfigError(
                f"wording {self.wording.name} has {', '.join(self.wording.languages)}, but sample {self.key} has a"
                f" target in {target.language!r} ({target.phrase!r}). Add this language to the wording, or remove such"
                " targets"
            )
        return sentences

    def _values(self, target: Target, shown: Sequence[Box]) -> dict[str, str]:
        """Return the values of the placeholders for one target; without boxes, the not-found sentence replaces them."""
        return {
            "boxes": format_boxes(shown, self.size_px) if shown else self._sentences(target).not_found,
            "phrase": target.phrase,
            "count": str(len(target.boxes_xyxy)),
            "description": target.description or target.phrase,
        }

    def _shuffled(self, targets: Sequence[Target]) -> list[Target]:
        shuffled = list(targets)
        if not self.in_order:
            self.rng.shuffle(shuffled)
        return shuffled

    def _groups(self, targets: Sequence[Target]) -> list[Sequence[Target]]:
        size = group_size(self.wording)
        return [targets[i : i + size] for i in range(0, len(targets), size)]

    def _shown(self, target: Target, limit: int | None = None) -> list[Box]:
        """Return the first boxes of a target in the order of the wording."""
        boxes = list(target.boxes_xyxy)
        if self.wording.box_order == "left_to_right":
            boxes.sort()
        elif self.wording.box_order == "large_first":
            boxes.sort(key=lambda box: (box[0] - box[2]) * (box[3] - box[1]))
        return boxes[: self.wording.max_boxes if limit is None else limit]

    def _divided_boxes(self, targets: Sequence[Target]) -> list[list[Box]]:
        """Return the boxes to list for each target: the longest lists are cut until all fit."""
        limits = [len(target.boxes_xyxy) for target in targets]
        while sum(limits) > self.wording.max_boxes:
            limits[limits.index(max(limits))] -= 1
        return [self._shown(target, limit) for target, limit in zip(targets, limits, strict=True)]

    def _check_reads_back(self, text: str, shown: Sequence[Box], phrase: str) -> None:
        if parse_boxes(text) != [bins_from_box(box, self.size_px) for box in shown]:
            raise DataError(
                f"sample {self.key}: the text {text!r:.300} does not read back as the boxes of {phrase!r:.100}."
                " Remove the double brackets from its phrase and description"
            )


def _by_language(targets: Sequence[Target]) -> list[list[Target]]:
    """Merge the targets, grouped by language: one question has one language."""
    languages = dict.fromkeys(target.language for target in targets)
    return [merge_targets([t for t in targets if t.language == language]) for language in languages]


def _together(targets: Sequence[Target]) -> Target:
    """Combine several targets into one with all their boxes."""
    boxes = tuple(box for target in targets for box in target.boxes_xyxy)
    return Target(_join(targets), targets[0].language, boxes)


def _join(targets: Sequence[Target], present: bool = False) -> str:
    """Join the phrases; with `present`, only those of present targets."""
    return _AND[targets[0].language].join(t.phrase for t in targets if t.boxes_xyxy or not present)


def _note(sentences: LanguageWording, num_boxes: int, num_shown: int) -> str:
    """Return the note that not all boxes are listed, or "" if they are."""
    return fill(sentences.more, {"count": str(num_boxes), "shown": str(num_shown)}) if num_shown < num_boxes else ""


def _fill_answer(template: str, values: dict[str, str], note: str) -> str:
    """Fill the template; put the note at the placeholder for it, or else at the end."""
    text = fill(template, {**values, "more": note})
    return text if "more" in placeholders(template) else text + note
