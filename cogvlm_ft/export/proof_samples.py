"""What the proof of an export is asked: held-out photos of the run, or made pictures where these cannot be read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from PIL import Image

from cogvlm_ft.data.collate import Batch, Example, collate
from cogvlm_ft.data.encode import encode_turns
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.loader import turns_of
from cogvlm_ft.data.plan import Item
from cogvlm_ft.data.reader import Sample, ShardReader
from cogvlm_ft.data.record import Record
from cogvlm_ft.data.transforms import move_record, resize_of, whole_frame
from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.grounding.targets import Target
from cogvlm_ft.grounding.wording import Wording, load_wording
from cogvlm_ft.model import CogVLMConfig, CogVLMTokenizer, preprocess_image
from cogvlm_ft.settings import Config

logger = logging.getLogger(__name__)

MAX_TURNS = 4  # of one photo: logits of every answer token are kept twice
BATCH_SIZE = 10  # photos that share one reading of the weights
MADE_SIDE_PX = 320
MADE = "made pictures"


@dataclass(frozen=True)
class ProofSamples:
    """At most BATCH_SIZE photos a batch. origin: the split they are of, or MADE."""

    batches: list[Batch]
    origin: str


def read_samples(config: Config | None, model: CogVLMConfig, tokenizer: CogVLMTokenizer, number: int) -> ProofSamples:
    """The first usable photos of data.val_split. config: of the run, None if it is not known."""
    try:
        if config is None:
            raise ConfigError("the run has no readable config.yaml")
        data = config.data
        index = load_index(data.shards, data.val_split, cache_dir=data.cache_dir, cache_gib=data.cache_gib)
        wording, origin = load_wording(data.wording), data.val_split
        found = _examples(_usable(ShardReader(index)), wording, config.seed, model, tokenizer)
        examples = list(islice(found, number))
        if not examples:
            raise DataError(f"no usable photo in split {origin!r}")
    except (ConfigError, DataError, OSError) as error:
        logger.warning("the proof takes %s, as the run's own shards cannot be read: %s", MADE, error)
        origin = MADE
        examples = list(_examples(map(_make_sample, range(number)), load_wording("box"), 0, model, tokenizer))
    batches = [collate(examples[start : start + BATCH_SIZE]) for start in range(0, len(examples), BATCH_SIZE)]
    return ProofSamples(batches, origin)


def _usable(reader: ShardReader) -> Iterator[Sample]:
    for index in range(len(reader)):
        try:
            yield reader.read(index)
        except DataError as error:
            logger.warning("photo cannot be used: %s", error)


def _examples(
    samples: Iterable[Sample], wording: Wording, seed: int, model: CogVLMConfig, tokenizer: CogVLMTokenizer
) -> Iterator[Example]:
    """In the words of epoch 0, as in evaluation; photos without a question are passed over."""
    for sample in samples:
        try:
            frame = whole_frame(sample.record, resize_of(model))
            turns = turns_of(move_record(sample.record, frame), wording, seed=seed, epoch=0)[:MAX_TURNS]
            sequences = encode_turns(turns, tokenizer, model)
        except DataError as error:
            logger.warning("photo cannot be used: %s", error)
            continue
        if turns:
            pixels = preprocess_image(frame.apply_image(sample.image, model.image_size), model.image_size)
            yield Example(sample.record.key, Item(0, 0, 1.0), pixels, sequences, 1.0, len(turns))


def _make_sample(number: int) -> Sample:
    """A bright rectangle on noise, and one question about it. The same number gives the same picture."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 128, (MADE_SIDE_PX, MADE_SIDE_PX, 3), dtype=np.uint8)
    x0, y0, width, height = (int(value) for value in rng.integers(20, MADE_SIDE_PX // 2 - 20, 4))
    pixels[y0 : y0 + height, x0 : x0 + width] = rng.integers(128, 256, 3, dtype=np.uint8)
    language, phrase = (("en", "the rectangle"), ("zh", "长方形"))[number % 2]
    target = Target(phrase, language, ((x0, y0, x0 + width, y0 + height),))
    record = Record(f"made-{number}", (MADE_SIDE_PX, MADE_SIDE_PX), MADE, (target,), ())
    return Sample(record, Image.fromarray(pixels))
