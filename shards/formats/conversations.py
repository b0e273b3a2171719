"""Conversations about one image, as in several formats."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cogvlm_ft.grounding.targets import Turn
from cogvlm_ft.shards.formats.box_text import normalise_box_text
from cogvlm_ft.shards.packing.candidates import Problem, Rejected, require, shown

Message = tuple[Any, Any]
"""The speaker, and the text."""
MAX_EARLIER = 50
"""Maximum number of pairs kept as the history of a turn: more than fit in any sequence."""
_ASKS, _ANSWERS = ("user", "human"), ("assistant", "gpt", "bot")


def questions_and_answers(messages: Iterable[Message], source: str, problems: list[Problem]) -> list[tuple[str, str]]:
    """Return the pairs in order; a message outside a pair becomes a problem, a system message is left out."""
    pairs: list[tuple[str, str]] = []
    question: str | None = None
    for i, (role, text) in enumerate(messages):
        try:
            require(isinstance(role, str), "turn", "the speaker", role, '"user" or "assistant"')
            if role == "system":
                continue
            require(isinstance(text, str), "turn", f"the text of {role!r:.20}", text, "a string")
            if role in _ASKS:
                if question is not None:
                    problems.append(_unanswered(question, source))
                question = text
            else:
                require(role in _ANSWERS, "turn", "the speaker", role, '"user" or "assistant"')
                require(question is not None, "turn", "the answer", text, "a question before it")
                pairs.append((str(question), text))
                question = None
        except Rejected as rejected:
            problems.append(rejected.problem(f"{source} message {i}"))
            question = None
    if question is not None:
        problems.append(_unanswered(question, source))
    return pairs


def checked_turn(
    prompt: str, answer: str, earlier: tuple[tuple[str, str], ...], source: str, problems: list[Problem]
) -> Turn:
    """Return a pair as a turn, checked as in `checked_pair`. earlier: the pairs before it in the same conversation."""
    if len(earlier) > MAX_EARLIER:
        raise Rejected("turn", "long_conversation", f"more than {MAX_EARLIER} pairs before it")
    return Turn(*checked_pair(prompt, answer, source, problems), history=earlier)


def checked_pair(prompt: str, answer: str, source: str, problems: list[Problem]) -> tuple[str, str]:
    """Return both texts with their boxes in the model's form; raises Rejected if one is empty or unclear.

    problems: gets a note about each text that was changed; others are returned as they are.
    """
    written: list[str] = []
    notes: list[Problem] = []
    for name, text in (("the prompt", prompt), ("the answer", answer)):
        require(bool(text.strip()), "turn", name, text, "a text that is not empty")
        written.append(normalise_box_text(text, name, is_prompt=name == "the prompt"))
        if written[-1] != text:
            detail = f"{name} was {text!r:.80}; written as {written[-1]!r:.80}"
            notes.append(Problem("note", "box_text_normalised", detail, source))
    problems += notes
    return written[0], written[1]


def _unanswered(question: str, source: str) -> Problem:
    return Problem("turn", "no_answer", f"no answer to {shown(question)}", source)
