"""How many turns the data has, and how long its answers may be, as far as it is known before anything is loaded."""

from __future__ import annotations

from cogvlm_ft.data.reader import open_split
from cogvlm_ft.data.tiling import photo_tiles
from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.grounding.turns import most_turns
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model import CogVLMConfig
from cogvlm_ft.planning.activations import MicroBatchShape
from cogvlm_ft.settings import Config

BOX_TOKENS = len("ddd,ddd,ddd,ddd;")  # each character is a token
NUM_RECORDS = 200  # read to estimate the tiles of an image
SENTENCE_TOKENS = 60  # of an answer, around its boxes; an estimate


def most_turns_of(config: Config, split: str) -> int | None:
    """Return the turns of the image that has most, by the index of the shards; None if it cannot be read from here."""
    try:
        index = open_split(config, split).index
        worded = most_turns(max(0, int(index.num_targets.max(initial=0))), load_wording(config.data.wording))
    except (ConfigError, DataError, OSError):
        return None
    return max(1, worded + max(0, int(index.num_turns.max(initial=0))))


def mean_looks(config: Config) -> float:
    """Return how many times an evaluation shows an image on average: once, and once for each of its tiles.

    By records that are spread over the validation split; 1 if they cannot be read from here.
    """
    tiles, counts = config.data.tiles, list[int]()
    if tiles.side_px is None:
        return 1.0
    try:
        reader = open_split(config, config.data.val_split)
        for i in range(0, len(reader), -(-len(reader) // NUM_RECORDS)):
            num_tiles = len(photo_tiles(reader.read_size(i, reader.read_record(i)), tiles))
            counts.append(num_tiles + (tiles.whole or not num_tiles))
    except (ConfigError, DataError, OSError):
        return 1.0
    return sum(counts) / len(counts)


def largest_pass(config: Config, model: CogVLMConfig) -> MicroBatchShape:
    """Return the shape of a pass over images with the most turns, of which each has the default length.

    Longer sequences than data.max_sequence_length are not trained on.
    """
    data, usual = config.data, MicroBatchShape()
    turns = most_turns_of(config, data.train_split) or 1
    room = (data.max_sequence_length - model.num_patches - 3) // usual.turn_tokens
    turns = max(1, min(turns, data.max_turns_per_image or turns, room))
    asked = most_turns_of(config, data.val_split)
    return MicroBatchShape(num_images=config.train.micro_batch_size, turns=turns, asked_turns=asked)


def longest_answer(config: Config, model: CogVLMConfig) -> int:
    """Return the limit of new tokens that an evaluation may reach: evaluate.max_new_tokens, else that of the wording.

    The evaluation itself takes it from the true answers, which are shorter in most data.
    """
    if config.evaluate.max_new_tokens:
        return config.evaluate.max_new_tokens
    try:
        max_boxes = load_wording(config.data.wording).max_boxes
    except ConfigError:
        max_boxes = 1
    longest = BOX_TOKENS * max_boxes + SENTENCE_TOKENS
    return min(longest + longest // 4, model.max_position_embeddings)
