"""The content of one image according to its annotations, and which phrases cannot be called absent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cogvlm_ft.grounding.targets import Target
from cogvlm_ft.shards.negatives.lexicon import Lexicon
from cogvlm_ft.shards.negatives.meaning import Meaning, read_meaning
from cogvlm_ft.shards.packing.candidates import Candidate, Problem

_CROWD = "crowd"
_LOSES_NOTHING = (_CROWD, "joined_part")


@dataclass(frozen=True)
class Photo:
    """names: what is present, each with its target if it has one. texts: all other texts about the image.

    exhaustive: every object that the data set has a name for is annotated. understood: all names are complete.
    spoken_of: the concepts of names and texts with their relatives; if not exhaustive, with their company too.
    """

    names: tuple[tuple[Meaning, Target | None], ...]
    texts: tuple[Meaning, ...]
    exhaustive: bool
    understood: bool
    spoken_of: frozenset[str]

    def may_show(self, phrase: Meaning, lexicon: Lexicon) -> bool:
        """Return whether the phrase may name something that this image is said to show; True when in doubt."""
        if not self.spoken_of.isdisjoint(phrase.concepts):
            return True
        if phrase.complete and self.understood:
            return False
        found = any(could_be(phrase, name, lexicon, trusted=self.exhaustive) for name, _ in self.names)
        return found or self.mentions(phrase, lexicon)

    def mentions(self, phrase: Meaning, lexicon: Lexicon) -> bool:
        """Return whether a text besides the names mentions it."""
        return any(_is_mentioned(phrase, text, lexicon) for text in self.texts)


def read_photo(candidate: Candidate, others: Sequence[Candidate], exhaustive: bool, lexicon: Lexicon) -> Photo | str:
    """Return what is said about the image, or the reason why nothing can be called absent from it.

    others: the other candidates of the same image.
    """
    everything = (candidate, *others)
    exhaustive = exhaustive and all(part.lists_all for part in everything)
    if any(_loses_names(problem) for part in everything for problem in part.problems):
        return "photos_with_losses"  # what was lost is in the image, and its name may be lost too
    names: list[tuple[Meaning, Target | None]] = [pair for part in everything for pair in _names(part, lexicon)]
    crowds = [problem.detail for part in everything for problem in part.problems if problem.reason == _CROWD]
    names += [(read_meaning(detail.rpartition(":")[0] or detail, lexicon), None) for detail in crowds]
    understood = all(name.complete for name, _ in names)
    if not exhaustive and not understood:
        return "photos_not_understood"
    texts = tuple(read_meaning(text, lexicon) for part in everything for text in _texts(part))
    concepts = {concept for name, _ in names for concept in name.concepts}
    named = lexicon.relatives(concepts) if exhaustive else lexicon.company(concepts)
    mentioned = lexicon.relatives(concept for text in texts for concept in text.concepts)
    return Photo(tuple(names), texts, exhaustive, understood, named | mentioned)


def _loses_names(problem: Problem) -> bool:
    return not problem.is_note and problem.reason not in _LOSES_NOTHING


def could_be(phrase: Meaning, name: Meaning, lexicon: Lexicon, *, trusted: bool) -> bool:
    """Return whether both may name the same kind of object; True when in doubt.

    trusted: both are names of one data set, which gives different objects different names.
    """
    if name.vague or not lexicon.relatives(phrase.concepts).isdisjoint(name.concepts):
        return True
    if phrase.complete and name.complete:
        return False
    return _overlap(phrase, name) or not trusted or phrase.language != name.language


def _overlap(a: Meaning, b: Meaning) -> bool:
    """Return whether both have the same head word, or one contains the words of the other."""
    if _holds(a, b) or _holds(b, a):
        return True
    if not a.head or not b.head:
        return False
    if a.language == "zh":
        return a.head.endswith(b.head[-2:]) or b.head.endswith(a.head[-2:])
    return a.head == b.head


def _holds(text: Meaning, phrase: Meaning) -> bool:
    return bool(phrase.core) and (phrase.core in text.whole or phrase.content <= text.content)


def _is_mentioned(phrase: Meaning, text: Meaning, lexicon: Lexicon) -> bool:
    return not lexicon.relatives(phrase.concepts).isdisjoint(text.concepts) or _holds(text, phrase)


def _names(candidate: Candidate, lexicon: Lexicon) -> Iterator[tuple[Meaning, Target]]:
    """Yield the phrases with boxes. If one phrase of a box is clear, its others need not be: "the right one"."""
    present = [(read_meaning(target.phrase, lexicon), target) for target in candidate.targets if target.boxes_xyxy]
    clear = {target.boxes_xyxy for meaning, target in present if meaning.complete}
    for meaning, target in present:
        yield replace(meaning, complete=True, vague=False) if target.boxes_xyxy in clear else meaning, target


def _texts(candidate: Candidate) -> Iterator[str]:
    for target in candidate.targets:
        if not target.boxes_xyxy:
            yield target.phrase
        if target.description:
            yield target.description
    for turn in candidate.turns:
        yield from (turn.prompt, turn.answer)
        yield from (text for earlier in turn.history for text in earlier)
