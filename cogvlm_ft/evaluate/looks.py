"""The parts of a photo that the model is shown: the whole photo and tiles, with the questions about each."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from PIL import Image

from cogvlm_ft.data.frames import Frame, fit
from cogvlm_ft.data.mentions import compares_in_image
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.record import BadSampleError
from cogvlm_ft.data.stored_photo import StoredPhoto
from cogvlm_ft.data.tiling import photo_tiles
from cogvlm_ft.evaluate.questions import Question, asks_for_boxes, read_questions
from cogvlm_ft.grounding.targets import Turn
from cogvlm_ft.grounding.tiles import Window
from cogvlm_ft.grounding.wording import Wording
from cogvlm_ft.tile_settings import TilesConfig

logger = logging.getLogger(__name__)

_NO_IMAGE = Image.new("RGB", (1, 1))


class LookPlace(NamedTuple):
    """A look among those of a photo."""

    photo: int
    number: int


@dataclass(frozen=True)
class Look:
    """A part of a photo as the model sees it. numbers: of the question's turns that are asked about it."""

    question: Question
    frame: Frame
    numbers: tuple[int, ...]

    @property
    def turns(self) -> list[Turn]:
        return [self.question.turns[number] for number in self.numbers]

    def without_image(self) -> Look:
        """Return the look as it is scored, for which the image is not kept."""
        return replace(self, question=replace(self.question, image=_NO_IMAGE))


def can_ask_in_tiles(turn: Turn) -> bool:
    """Return whether a question means the same about a part of a photo.

    It follows no other, names no place and no rank, and its answer is one list of boxes, not one for each of several
    phrases.
    """
    target = turn.target
    texts = [target.phrase, *(words for _, words in target.names)] if target else [turn.prompt]
    return turn.scored and not turn.history and turn.style != "steps" and not any(map(compares_in_image, texts))


def split_turns(
    size_px: tuple[int, int], in_tiles: Sequence[bool], tiles: TilesConfig | None
) -> list[tuple[Window | None, tuple[int, ...]]]:
    """Return the looks at a photo: the window of a tile, or None for the whole photo, and the turns that are asked.

    in_tiles: of every turn, whether it can be asked about a tile. The others are asked about the whole photo, even if
    `tiles` leaves it out.
    """
    windows = photo_tiles(size_px, tiles) if tiles is not None and tiles.side_px is not None else []
    everything = tuple(range(len(in_tiles)))
    asked = tuple(number for number in everything if in_tiles[number])
    if tiles is None or not windows or not asked:
        return [(None, everything)]
    whole = everything if tiles.whole else tuple(number for number in everything if not in_tiles[number])
    shown: list[tuple[Window | None, tuple[int, ...]]] = [(window, asked) for window in windows]
    return [(None, whole), *shown] if whole else shown


def looks_at(question: Question, tiles: TilesConfig | None, resize: str, not_found: Sequence[str]) -> list[Look]:
    """Return the looks at a photo, the whole one first."""
    photo_px, size_px = question.frame.photo_px, question.frame.size_px
    in_tiles = [asks_for_boxes(turn, size_px, not_found) and can_ask_in_tiles(turn) for turn in question.turns]
    return [
        Look(question, question.frame if window is None else fit(Frame(photo_px, window), resize), numbers)
        for window, numbers in split_turns(photo_px, in_tiles, tiles)
    ]


class LookReader:
    """Reads the looks of the photos of a split; a photo is read once for all of its neighbouring looks."""

    def __init__(
        self, reader: ShardReader, wording: Wording, seed: int, resize: str, tiles: TilesConfig | None
    ) -> None:
        """Prepare to read. tiles: None shows whole photos only."""
        self.reader, self.wording, self.seed, self.resize, self.tiles = reader, wording, seed, resize, tiles
        self._photo: int | None = None
        self._looks: list[Look] = []
        self.bad: set[int] = set()

    def read(self, places: Iterable[LookPlace]) -> Iterator[Look]:
        """Yield the looks of usable photos; `bad` holds the others, also those of which some looks were shown already.

        A photo with a damaged tile is not usable.
        """
        for place in places:
            if place.photo != self._photo:
                self._photo, self._looks = place.photo, self._looks_at(place.photo)
            look = self._looks[place.number] if place.number < len(self._looks) else None
            if look is None or not _can_be_shown(look):
                self.bad.add(place.photo)
            if look is not None and place.photo not in self.bad:
                yield look

    def _looks_at(self, photo: int) -> list[Look]:
        questions = read_questions(self.reader, [photo], self.wording, self.seed, self.resize)
        sentences = self.wording.not_found_sentences
        return [look for each in questions for look in looks_at(each, self.tiles, self.resize, sentences)]


def _can_be_shown(look: Look) -> bool:
    """Decode the stored tile of a look; report one that is damaged."""
    try:
        if isinstance(look.question.image, StoredPhoto):
            look.question.image.show(look.frame.window_px)
    except BadSampleError as error:
        logger.warning("validation image cannot be used: %s", error)
        return False
    return True
