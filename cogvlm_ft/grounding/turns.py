"""From targets to questions and answers: the same seed, epoch and key always give the same turns."""

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
    targets: Sequence[Target], image_size_px: tuple[int, int], wording: Wording, *, seed: int, epoch: int, key: str
) -> list[Turn]:
    """The turns about one picture, in an order and a wording that depend on (seed, epoch, key) only.

    key: names the sample. A wording that describes boxes leaves absent targets out, so there may be no turns. Raises
    ConfigError when the wording lacks a target's language, DataError when a phrase or description breaks the box text.
    """
    rng = random.Random(f"{seed}:{epoch}:{key}")
    part = _choose_part(wording, targets, rng)
    return [replace(turn, style=part.style) for turn in _Picture(key, image_size_px, part, rng).turns(targets)]


def most_turns(num_targets: int, wording: Wording) -> int:
    """The most turns that `build_turns` makes of so many targets, whatever they are."""
    if wording.mix:
        return max(most_turns(num_targets, part) for part in wording.mix)
    if wording.style not in ("steps", "conversation"):
        return num_targets
    num_languages = min(len(wording.languages), num_targets)  # each has groups of its own
    num_groups = num_languages + (num_targets - num_languages) // group_size(wording)
    return num_groups if wording.style == "steps" else num_groups + num_targets


def group_size(wording: Wording) -> int:
    """How many targets a step-wise answer or a conversation is about: each must be left with a box."""
    return min(wording.max_targets, wording.max_boxes)


def merge_targets(targets: Sequence[Target]) -> list[Target]:
    """One target per phrase and language, with all its boxes; a description stays if there is only one."""
    same: dict[tuple[str, str], list[Target]] = {}
    for target in targets:
        same.setdefault((target.phrase, target.language), []).append(target)
    return [_merge(group) if len(group) > 1 else group[0] for group in same.values()]


def _merge(targets: Sequence[Target]) -> Target:
    boxes = tuple(dict.fromkeys(box for target in targets for box in target.boxes_xyxy))
    descriptions = {target.description for target in targets if target.description}
    return replace(targets[0], boxes_xyxy=boxes, description=descriptions.pop() if len(descriptions) == 1 else None)


def _choose_part(wording: Wording, targets: Sequence[Target], rng: random.Random) -> Wording:
    """A part of a mix; one that describes boxes only where there are some."""
    if not wording.mix:
        return wording
    parts = [part for part in wording.mix if part.style != "describe" or any(t.boxes_xyxy for t in targets)]
    parts = parts or list(wording.mix)
    return rng.choices(parts, [part.weight for part in parts])[0]


@dataclass(frozen=True)
class _Picture:
    """What every turn about one picture shares."""

    key: str
    size_px: tuple[int, int]
    wording: Wording
    rng: random.Random

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
        """Phrase -> boxes."""
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
        """Boxes -> description."""
        sentences = self._sentences(target)
        shown = self._shown(target)
        values = self._values(target, shown)
        prompt = fill(self.rng.choice(sentences.prompts), values)
        self._check_reads_back(prompt, shown, target.phrase)
        answer = fill(self.rng.choice(sentences.answers), values)
        return Turn(prompt, answer, target, scored=False, num_cut_boxes=len(target.boxes_xyxy) - len(shown))

    def _steps(self, targets: list[Target]) -> list[Turn]:
        """One answer for many targets: how many and what, then a line for each.

        A question that names no phrases is about everything in the picture, so absent targets are no part of it.
        """
        template = self.rng.choice(self._sentences(targets[0]).prompts)
        if "phrases" in placeholders(template):
            return [self._step_wise(template, group, group) for group in self._groups(self._shuffled(targets))]
        present = [target for target in targets if target.boxes_xyxy]
        return [self._step_wise(template, present or targets, present[: group_size(self.wording)])]

    def _step_wise(self, template: str, asked: Sequence[Target], lined: Sequence[Target]) -> Turn:
        """asked: what the question is about. lined: those of them that get a line."""
        sentences, together = self._sentences(asked[0]), _together(asked)
        prompt = fill(template, {"phrases": together.phrase, "not_found": sentences.not_found})
        answer, line = self.rng.choice(sentences.answers), self.rng.choice(sentences.lines)
        if not together.boxes_xyxy:
            return Turn(prompt, sentences.not_found, together)
        lists = self._shared_out(lined)
        values = [self._values(target, shown) for target, shown in zip(lined, lists, strict=True)]
        lines = [fill(line, {**value, "number": str(number)}) for number, value in enumerate(values, 1)]
        all_shown = [box for shown in lists for box in shown]
        num_boxes = len(together.boxes_xyxy)
        found = {"phrases": _join(asked, present=True), "count": str(num_boxes), "lines": "\n".join(lines)}
        text = _fill_answer(answer, found, _note(sentences, num_boxes, len(all_shown)))
        self._check_reads_back(text, all_shown, together.phrase)
        return Turn(prompt, text, together, num_cut_boxes=num_boxes - len(all_shown))

    def _conversations(self, targets: list[Target]) -> list[Turn]:
        """First how many and what, then one turn per target; every turn knows those before it."""
        turns: list[Turn] = []
        for group in self._groups(self._shuffled(targets)):
            sentences = self._sentences(group[0])
            template = self.rng.choice(sentences.first_prompts)
            conversation = [self._first(template, group if "phrases" in placeholders(template) else targets)]
            for target, shown in zip(group, self._shared_out(group), strict=True):
                history = tuple((turn.prompt, turn.answer) for turn in conversation)
                conversation.append(replace(self._refer(target, shown), history=history))
            turns += conversation
        return turns

    def _first(self, template: str, asked: Sequence[Target]) -> Turn:
        """The first turn of a conversation, which has no box in its answer."""
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
                f" target in {target.language!r} ({target.phrase!r}): add this language to the wording or drop such"
                " targets"
            )
        return sentences

    def _values(self, target: Target, shown: Sequence[Box]) -> dict[str, str]:
        """What the placeholders of one target stand for; in a line, the not-found sentence takes the boxes' place."""
        return {
            "boxes": format_boxes(shown, self.size_px) if shown else self._sentences(target).not_found,
            "phrase": target.phrase,
            "count": str(len(target.boxes_xyxy)),
            "description": target.description or target.phrase,
        }

    def _shuffled(self, targets: Sequence[Target]) -> list[Target]:
        shuffled = list(targets)
        self.rng.shuffle(shuffled)
        return shuffled

    def _groups(self, targets: Sequence[Target]) -> list[Sequence[Target]]:
        size = group_size(self.wording)
        return [targets[i : i + size] for i in range(0, len(targets), size)]

    def _shown(self, target: Target, limit: int | None = None) -> list[Box]:
        """The first boxes of a target in the order of the wording."""
        boxes = list(target.boxes_xyxy)
        if self.wording.box_order == "left_to_right":
            boxes.sort()
        elif self.wording.box_order == "large_first":
            boxes.sort(key=lambda box: (box[0] - box[2]) * (box[3] - box[1]))
        return boxes[: self.wording.max_boxes if limit is None else limit]

    def _shared_out(self, targets: Sequence[Target]) -> list[list[Box]]:
        """The boxes that are shown of each target: the longest lists are cut until all fit."""
        limits = [len(target.boxes_xyxy) for target in targets]
        while sum(limits) > self.wording.max_boxes:
            limits[limits.index(max(limits))] -= 1
        return [self._shown(target, limit) for target, limit in zip(targets, limits, strict=True)]

    def _check_reads_back(self, text: str, shown: Sequence[Box], phrase: str) -> None:
        if parse_boxes(text) != [bins_from_box(box, self.size_px) for box in shown]:
            raise DataError(
                f"sample {self.key}: the text {text!r:.300} does not read back as the boxes of {phrase!r:.100}:"
                " take the double brackets out of its phrase and description"
            )


def _by_language(targets: Sequence[Target]) -> list[list[Target]]:
    """Merged, and never two languages in one question."""
    languages = dict.fromkeys(target.language for target in targets)
    return [merge_targets([t for t in targets if t.language == language]) for language in languages]


def _together(targets: Sequence[Target]) -> Target:
    """One target that stands for all: the boxes of every one of them."""
    boxes = tuple(box for target in targets for box in target.boxes_xyxy)
    return Target(_join(targets), targets[0].language, boxes)


def _join(targets: Sequence[Target], present: bool = False) -> str:
    """The phrases; only of what is in the picture, if `present`."""
    return _AND[targets[0].language].join(t.phrase for t in targets if t.boxes_xyxy or not present)


def _note(sentences: LanguageWording, num_boxes: int, num_shown: int) -> str:
    """That there are more boxes than the answer lists, if there are."""
    return fill(sentences.more, {"count": str(num_boxes), "shown": str(num_shown)}) if num_shown < num_boxes else ""


def _fill_answer(template: str, values: dict[str, str], note: str) -> str:
    """The note stands where the template wants it, or else at the end."""
    text = fill(template, {**values, "more": note})
    return text if "more" in placeholders(template) else text + note
