"""Survey what an evaluation will ask: how long its true answers are, and how many turns each image has.

The limit of new tokens follows from it, so that a model that answers as it was taught is never cut.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from cogvlm_ft.data.encode import encode_prompt
from cogvlm_ft.data.look import turns_of
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.tiling import check_stored
from cogvlm_ft.errors import DataError, ServerError
from cogvlm_ft.evaluate.generate import FIRST_TEXT_POSITION
from cogvlm_ft.evaluate.looks import LookPlace, can_ask_in_tiles, split_turns
from cogvlm_ft.evaluate.questions import asks_for_boxes
from cogvlm_ft.grounding.targets import Target
from cogvlm_ft.grounding.turns import build_turns, group_size
from cogvlm_ft.grounding.wording import Wording
from cogvlm_ft.model.configuration import CogVLMConfig
from cogvlm_ft.model.generation_memory import Pass
from cogvlm_ft.model.tokenizer import CogVLMTokenizer
from cogvlm_ft.runtime.distributed import from_main, gather_to_main, is_main, rank, world_size
from cogvlm_ft.runtime.stop_signals import StopRequest, stopping_together
from cogvlm_ft.runtime.watchdog import progress
from cogvlm_ft.tile_settings import TilesConfig

logger = logging.getLogger(__name__)

MARGIN_FRACTION, MARGIN_TOKENS = 4, 32
"""Room for an answer that is longer than the true one: a quarter, but at least this many tokens, two boxes."""
SIZE_PX = (1000, 1000)  # of an image whose record does not say it; box text has the same length for every size
NUM_DRAWN = 24  # the sentences of a wording are drawn at random


@dataclass(frozen=True)
class Survey:
    """What will be asked. num_turns: about each look at every image; (0,) for one whose record cannot be used.

    answer_tokens: of every image's longest true answer, with eos. prompt_tokens: of the longest prompt, its history
    included.
    """

    num_turns: tuple[tuple[int, ...], ...]
    answer_tokens: tuple[int, ...]
    prompt_tokens: int

    def places(self, of_rank: int, num_ranks: int) -> list[LookPlace]:
        """Return the looks of a rank, which takes every num_ranks-th image."""
        photos = range(of_rank, len(self.num_turns), num_ranks)
        return [LookPlace(photo, number) for photo in photos for number in range(len(self.num_turns[photo]))]

    def passes(self, size: Pass, num_ranks: int) -> list[int]:
        """Return the passes of every batch, the same on all ranks: as many as the look with the most turns needs."""
        turns = [[self.num_turns[p][n] for p, n in self.places(each, num_ranks)] for each in range(num_ranks)]
        most = [max(row, default=0) for row in zip_longest(*turns, fillvalue=0)]
        batches = (most[start : start + size.num_images] for start in range(0, len(most), size.num_images))
        return [-(-max([1, *batch]) // size.num_turns) for batch in batches]


def survey_questions(
    reader: ShardReader,
    num_samples: int,
    wording: Wording,
    tokenizer: CogVLMTokenizer,
    config: CogVLMConfig,
    seed: int,
    stop_request: StopRequest | None = None,
    tiles: TilesConfig | None = None,
) -> Survey:
    """Read the records of the first `num_samples` images, without the images. Collective: each rank reads its part.

    Raises StopRequested on every rank if a rank with a stop request cannot read its shards.
    """
    mine = []
    with stopping_together(stop_request, DataError, ServerError):
        for index in range(rank(), num_samples, world_size()):
            progress()
            mine.append((index, *_measure(reader, index, wording, tokenizer, config, seed, tiles)))
    parts = gather_to_main(mine)
    rows: list[tuple[int, tuple[int, ...], int, int]] = from_main(
        sorted(row for part in parts for row in part) if parts else None
    )
    return Survey(
        num_turns=tuple(turns for _, turns, _, _ in rows),
        answer_tokens=tuple(answer for _, _, answer, _ in rows),
        prompt_tokens=max([1, *(prompt for _, _, _, prompt in rows)]),
    )


def _measure(
    reader: ShardReader,
    index: int,
    wording: Wording,
    tokenizer: CogVLMTokenizer,
    config: CogVLMConfig,
    seed: int,
    tiles: TilesConfig | None,
) -> tuple[tuple[int, ...], int, int]:
    """Return the number of turns about each look, and the tokens of the longest answer and the longest prompt."""
    try:
        record = reader.read_record(index)
        if tiles is not None:
            check_stored(record, tiles)
        size_px = record.image_size_px or (SIZE_PX if tiles is None else reader.read_size(index, record))
        record = replace(record, image_size_px=size_px)
        turns = [turn for turn in turns_of(record, wording, seed=seed, epoch=0) if turn.prompt.strip()]
    except DataError:  # reported when the image is read
        return (0,), 0, 0
    answers = [len(tokenizer.encode(turn.answer)) + 1 for turn in turns]
    prompts = [len(encode_prompt(turn.prompt, tokenizer, config.template_version, turn.history)) for turn in turns]
    not_found = wording.not_found_sentences
    in_tiles = [asks_for_boxes(turn, size_px, not_found) and can_ask_in_tiles(turn) for turn in turns]
    looks = tuple(len(numbers) for _, numbers in split_turns(size_px, in_tiles, tiles)) if turns else (0,)
    return looks, max(answers, default=0), max(prompts, default=0)


def answer_limit(longest: int, prompt_tokens: int, config: CogVLMConfig) -> int:
    """Return the limit of new tokens for answers of up to `longest` tokens, within the model's context."""
    context = config.max_position_embeddings - FIRST_TEXT_POSITION - prompt_tokens
    return max(1, min(with_margin(longest), context))


def with_margin(longest: int) -> int:
    """Add room for an answer that is longer than the longest true one."""
    return longest + max(MARGIN_TOKENS, longest // MARGIN_FRACTION)


def choose_limit(survey: Survey, config: CogVLMConfig, setting: int | None, least: int = 1) -> int:
    """Return the limit of new tokens, and warn if it cuts true answers.

    setting: evaluate.max_new_tokens, which overrides the limit that follows from the data. least: tokens that the
    grammar needs.
    """
    longest = max([1, *survey.answer_tokens])
    limit = setting or max(least, answer_limit(longest, survey.prompt_tokens, config))
    num_cut = sum(tokens > limit for tokens in survey.answer_tokens)
    if num_cut and is_main():
        cause, fix = "max_position_embeddings of the model leaves", "Lower max_boxes of the wording"
        if setting:
            cause, fix = "evaluate.max_new_tokens allows", "Set evaluate.max_new_tokens=null"
        logger.warning(
            "%s %d new tokens: the true answers about %d of %d images have more, up to %d; such answers are cut and "
            "score less. %s",
            cause,
            limit,
            num_cut,
            len(survey.answer_tokens),
            longest,
            fix,
        )
    return limit


def longest_worded_answer(wording: Wording, tokenizer: CogVLMTokenizer) -> int:
    """Return the tokens of the longest answer that a wording writes, with eos: as many boxes as it allows."""
    if wording.mix:
        return max(longest_worded_answer(part, tokenizer) for part in wording.mix)
    return max(_longest_in(language, wording, tokenizer) for language in wording.languages)


def _longest_in(language: str, wording: Wording, tokenizer: CogVLMTokenizer) -> int:
    boxes = tuple((float(i % 900), float(i % 800), 999.0, 999.0) for i in range(wording.max_boxes))
    phrase = {"zh": "左边第二辆红色的汽车", "en": "the second red car on the left"}.get(language, "x")
    targets = [Target(f"{phrase} {i}", language, boxes) for i in range(group_size(wording))]
    drawn: Sequence[list[str]] = [
        [turn.answer for turn in build_turns(targets, SIZE_PX, wording, seed=0, epoch=0, key=str(key))]
        for key in range(NUM_DRAWN)
    ]
    return max(len(tokenizer.encode(answer)) + 1 for answers in drawn for answer in answers)
