"""What is asked about a picture (`Target`) and how it is put into words (`Turn`)."""

from __future__ import annotations

from dataclasses import dataclass

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Target:
    """One thing to find in one picture.

    phrase: the words that name it, in `language`.
    language: "zh" or "en".
    boxes_xyxy: pixels of the stored image, origin top left, (x0, y0, x1, y1); empty = the thing is not in the picture.
    description: a longer text about it, or None.
    """

    phrase: str
    language: str
    boxes_xyxy: tuple[Box, ...]
    description: str | None = None


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    target: what the turn was made from, or None for a prompt/answer pair that the user wrote.
    """

    prompt: str
    answer: str
    target: Target | None = None
