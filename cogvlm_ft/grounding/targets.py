"""What is asked about an image (`Target`), and the question and answer (`Turn`)."""

from __future__ import annotations

from dataclasses import dataclass, field

Box = tuple[float, float, float, float]


Name = tuple[str, str]
"""(language, words)"""


@dataclass(frozen=True)
class Target:
    """One object to find in one image.

    phrase: the words that name it, in `language`.
    language: "zh" or "en".
    boxes_xyxy: pixels of the stored image, origin top left, (x0, y0, x1, y1); empty = the target is absent.
    description: a longer text about it, or None.
    names: words to ask with instead of the phrase, which is a label then. A turn uses one of its own language.
    """

    phrase: str
    language: str
    boxes_xyxy: tuple[Box, ...]
    description: str | None = None
    names: tuple[Name, ...] = ()


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    target: what the turn was built from, with all its boxes, or None for a prompt/answer pair that the user wrote. A
        turn about several targets has one that holds the boxes of all of them.
    history: earlier (prompt, answer) pairs of the same conversation, oldest first.
    scored: False if the answer is free text built from a target, such as a description, without boxes to score.
    num_cut_boxes: boxes of the target that the answer leaves out, because the list would be too long.
    style: of the wording it was built with; "own" for the user's pairs.
    """

    prompt: str
    answer: str
    target: Target | None = None
    history: tuple[tuple[str, str], ...] = ()
    scored: bool = True
    num_cut_boxes: int = 0
    style: str = field(default="own", compare=False)
