"""Questions about several targets in the words of a wording, so that a model is asked as it was trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from cogvlm_ft.data.record import detect_language
from cogvlm_ft.data.stored_photo import Photo
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.grounding.targets import Target, Turn
from cogvlm_ft.grounding.turns import build_turns
from cogvlm_ft.grounding.wording import Wording
from cogvlm_ft.predict.predictor import Predictor, split_phrases

MAX_PHRASES = 50


def target_turns(phrases: Sequence[str], wording: Wording) -> list[Turn]:
    """Build turns that ask for these phrases. Their answers are empty placeholders.

    Style "steps": all in one answer; "conversation": which are present, then one by one; other styles: each alone.

    Raises ConfigError if the wording describes boxes, or lacks a language.
    """
    targets = [Target(phrase, detect_language(phrase), ()) for phrase in phrases]
    # Always the same sentences, about the phrases in the order asked.
    turns = build_turns(targets, (1, 1), wording, seed=0, epoch=0, key="", in_order=True)
    if not turns or any(turn.style == "describe" for turn in turns):
        raise ConfigError(f"wording {wording.name} asks about boxes; expected one that asks for them, such as steps")
    return [replace(turn, scored=False) if _begins_conversation(turn) else turn for turn in turns]


def _begins_conversation(turn: Turn) -> bool:
    return turn.style == "conversation" and not turn.history


def conversation_turns(predictor: Predictor, photos: Sequence[Photo], first_prompts: Sequence[str]) -> list[list[Turn]]:
    """Ask the user's own question about what is present, then build a turn for every phrase that the answer names.

    Raises ConfigError if the wording has no conversations: then the form of their first answers is not defined.
    """
    wording = predictor.wording
    if wording.style != "conversation":
        raise ConfigError(
            f"wording {wording.name} has the style {wording.style or 'mix'}: a question of your own in steps needs"
            " conversation, whose first answers name what is present"
        )
    firsts = [Turn(prompt, "", scored=False) for prompt in first_prompts]
    replies = predictor.ask_turns(photos, [[first] for first in firsts])
    return [
        [
            replace(turn, prompt=first.prompt) if _begins_conversation(turn) else turn
            for turn in (target_turns(phrases, wording) if phrases else [first])
        ]
        for first, phrases in (
            (first, read_phrases(row[0].text, wording)) for first, row in zip(firsts, replies, strict=True)
        )
    ]


def read_phrases(answer: str, wording: Wording) -> list[str]:
    """Return the phrases that the first answer of a conversation names; [] if no sentence of the wording fits it."""
    for sentences in wording.languages.values():
        for template in sentences.first_answers:
            found = re.fullmatch(_pattern(template), answer.strip())
            if found:
                return list(dict.fromkeys(split_phrases(found["phrases"])))[:MAX_PHRASES]
    return []


def _pattern(template: str) -> str:
    """Build a regular expression for what `fill` makes of a template, which names {phrases} at least once."""
    pattern = re.escape(template.strip()).replace(r"\{\{", r"\{").replace(r"\}\}", r"\}")
    pattern = pattern.replace(re.escape("{count}"), "[0-9]+")
    return pattern.replace(re.escape("{phrases}"), "(?P<phrases>.+)", 1).replace(re.escape("{phrases}"), "(?P=phrases)")
