"""Read the held-out images and their questions, whose true answers are known."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cogvlm_ft.data.frames import Frame, move_record, whole_frame
from cogvlm_ft.data.look import turns_of
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.record import BadSampleError, Record
from cogvlm_ft.data.stored_photo import Photo
from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.boxes import boxes_from_bins, parse_boxes
from cogvlm_ft.grounding.targets import Box, Turn
from cogvlm_ft.grounding.wording import Wording

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """One image and all its turns, whose boxes are in pixels of the frame. source: where the image came from."""

    index: int
    key: str
    source: str
    image: Photo
    frame: Frame
    turns: list[Turn]


def read_questions(
    reader: ShardReader, indices: Iterable[int], wording: Wording, seed: int, resize: str
) -> Iterator[Question]:
    """Yield the usable images among `indices`. The wording is that of epoch 0, so every evaluation asks the same."""
    for index in indices:
        try:
            sample = reader.read(index)
        except BadSampleError as error:  # other errors are those of the whole shard
            logger.warning("validation image cannot be used: %s", error)  # and counted by the caller
            continue
        try:
            frame = whole_frame(sample.record, resize)
            worded = turns_of(move_record(sample.record, frame), wording, seed=seed, epoch=0)
            turns = [turn for turn in worded if turn.prompt.strip()]
        except DataError as error:
            logger.warning("validation image cannot be used: %s", error)  # and counted by the caller
            continue
        if turns:
            yield Question(index, sample.record.key, source_of(reader, sample.record), sample.image, frame, turns)


def source_of(reader: ShardReader, record: Record) -> str:
    """Return the shard set, the prefix of its keys, where there are several; else the annotation."""
    return record.key.partition("/")[0] if len(reader.index.source_sizes) > 1 else record.source


def asks_for_boxes(turn: Turn, image_size_px: tuple[int, int], not_found: Sequence[str]) -> bool:
    """Decide whether a good answer holds boxes or is a not-found sentence."""
    return turn.scored and truth_boxes(turn, image_size_px, not_found) is not None


def truth_boxes(turn: Turn, image_size_px: tuple[int, int], not_found: Sequence[str]) -> list[Box] | None:
    """Return the target's boxes in pixels; of a verbatim turn those in its answer, [] for "not found", else None."""
    if turn.target is not None:
        return list(turn.target.boxes_xyxy)
    if turn.answer.strip() in not_found:
        return []
    bins = parse_boxes(turn.answer)
    return None if bins is None else in_pixels(bins, image_size_px)


def in_pixels(bins: Sequence[Box], image_size_px: tuple[int, int]) -> list[Box]:
    return [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes_from_bins(bins, image_size_px).tolist()]
