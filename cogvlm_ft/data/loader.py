"""Batches of one rank, from any position in an epoch to the end of the epoch."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cogvlm_ft.data.collate import BadSample, Batch, Example, collate
from cogvlm_ft.data.encode import encode_turns
from cogvlm_ft.data.look import Look, build_look
from cogvlm_ft.data.patience import start_loader_process
from cogvlm_ft.data.plan import Item, PhotoParts, SamplePlan, TurnsPart, rank_items
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.record import BadSampleError, Record
from cogvlm_ft.data.tiling import show_tile
from cogvlm_ft.data.transforms import resize_of
from cogvlm_ft.errors import ConfigError, DataError, ServerError
from cogvlm_ft.grounding.turns import most_turns
from cogvlm_ft.grounding.wording import Wording
from cogvlm_ft.model.configuration import CogVLMConfig
from cogvlm_ft.model.preprocess import preprocess_image
from cogvlm_ft.model.tokenizer import CogVLMTokenizer
from cogvlm_ft.runtime.stop_signals import kept_from_new_processes
from cogvlm_ft.runtime.watchdog import progress
from cogvlm_ft.settings import AugmentConfig
from cogvlm_ft.terminal import progress_bar
from cogvlm_ft.tile_settings import TilesConfig

MAX_REPLACEMENTS = 100  # neighbours tried in place of an unusable sample before giving up
FILES_PER_TENSOR, MORE_FILES = 2, 8  # a tensor in shared memory is sent as a copy of its file; a socket takes the rest


def most_turns_of(reader: ShardReader, wording: Wording) -> NDArray[np.int64]:
    """Return the largest number of turns that each image can have, int64[images]; 0 for an unusable record.

    Records are read where the index does not hold the counts.
    """
    num_targets, num_turns = reader.index.num_targets.copy(), reader.index.num_turns.copy()
    unknown = np.flatnonzero(num_targets < 0).tolist()
    for i in progress_bar(unknown, desc="count questions", unit="record", is_shown=bool(unknown)):
        progress()
        try:
            record = reader.read_record(i)
            num_targets[i], num_turns[i] = len(record.targets), len(record.turns)
        except BadSampleError:  # reported when it is loaded
            num_targets[i], num_turns[i] = 0, 0
    counts, places = np.unique(num_targets, return_inverse=True)
    worded = np.array([most_turns(int(count), wording) for count in counts], dtype=np.int64)
    return worded[places] + num_turns


@dataclass
class GroundingDataset(Dataset):
    """Item -> Example. A pure function, so that a resumed run gets identical examples.

    parts: which images are split into several sequences or shown in tiles; None: none are.
    """

    reader: ShardReader
    wording: Wording
    tokenizer: CogVLMTokenizer
    config: CogVLMConfig
    seed: int
    max_sequence_length: int
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    parts: PhotoParts | None = None
    tiles: TilesConfig = field(default_factory=TilesConfig)

    def __getitem__(self, item: Item) -> Example:
        """Return the item's sample; an unusable one is reported in `bad` and replaced by a neighbour of weight 0.

        Raises DataError if MAX_REPLACEMENTS samples in a row, or all that there are, cannot be used.
        """
        bad, why = None, None
        first, part = self.parts.find(item.index) if self.parts is not None else (item.index, TurnsPart(0, 1))
        num_tried = min(MAX_REPLACEMENTS, len(self.reader))
        for step in range(num_tried):
            index = (first + step) % len(self.reader)
            if step > 0 and self.parts is not None:
                part = self.parts.part(index, 0)
            try:
                example = self._encode(index, part, item)
            except BadSampleError as error:
                why = why or error
                if step == 0 and item.weight > 0:  # neighbours and padding are reported at their own positions
                    bad = BadSample(error.key, error.reason, error.detail)
            else:
                return example if step == 0 else replace(example, weight=0.0, bad=bad)
        tried = f"{num_tried} samples in a row" if num_tried > 1 else "the only sample"
        raise DataError(
            f"data.shards: {tried} cannot be used; the first is {why}; "
            "expected usable samples. Fix the annotations and build the shards again"
        )

    def look(self, record: Record, part: TurnsPart, epoch: int) -> Look:
        """Return what the model sees of an image, or of the tile that the part names, and all turns about it."""
        shown, tile = show_tile(record, part.tile, self.tiles, seed=self.seed, epoch=epoch)
        resize = resize_of(self.config)
        return build_look(shown, self.wording, self.augment, resize, seed=self.seed, epoch=epoch, tile=tile)

    def _encode(self, index: int, part: TurnsPart, item: Item) -> Example:
        sample = self.reader.read(index)
        key, size = sample.record.key, self.config.image_size
        try:
            look = self.look(sample.record, part, item.epoch)
            turns, weight = look.turns, item.weight
            if part.number >= max(1, len(turns)):  # fewer turns than the maximum: this part is empty
                turns, weight = turns[:1], 0.0
            else:
                turns = turns[part.cut]
            sequences = encode_turns(turns, self.tokenizer, self.config)
        except BadSampleError:
            raise
        except DataError as error:
            raise BadSampleError(key, "unusable_turn", str(error)) from error
        length = len(sequences.input_ids)
        if length > self.max_sequence_length:
            raise BadSampleError(
                key,
                "too_long",
                f"{length} tokens; expected at most data.max_sequence_length={self.max_sequence_length}",
            )
        return Example(
            key=key,
            item=item,
            pixel_values=preprocess_image(look.draw(sample.image, size), size),
            sequences=sequences,
            weight=weight,
            num_turns=len(turns),
            num_cut_boxes=sum(turn.num_cut_boxes for turn in turns),
        )


def read_steps(
    dataset: GroundingDataset,
    plan: SamplePlan,
    samples_consumed: int,
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    num_workers: int,
) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each optimizer step of this rank, from `samples_consumed` to the end of its epoch."""
    epoch, offset = plan.position(samples_consumed)
    micro_batches: list[list[Item]] = []
    num_accum_steps = 1
    for start in range(offset, plan.num_samples, plan.global_batch_size):
        batch = plan.global_batch(epoch, start)
        items = rank_items(batch, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)
        num_accum_steps = len(items)
        micro_batches += items
    loader = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=micro_batches,
        num_workers=num_workers,
        collate_fn=_collate_shared if num_workers else collate,
        worker_init_fn=start_loader_process if num_workers else None,
    )
    step: list[Batch] = []
    try:
        with kept_from_new_processes():
            batches = iter(loader)
        for batch in batches:
            step.append(batch)
            if len(step) == num_accum_steps:
                yield step
                step = []
    except (ConfigError, DataError, ServerError) as error:
        raise type(error)(_without_traceback(error)) from None


def end_loader_processes() -> None:
    """End what is left of the loader processes, which ignore SIGTERM: multiprocessing would wait for them at exit."""
    left = [process for process in multiprocessing.active_children() if process.daemon]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each of them
    for process in left:
        process.kill()


def _collate_shared(examples: list[Example]) -> Batch:
    """Collate in a loader process, and put the batch into shared memory here, where a failure reaches the rank.

    The thread that sends batches would only print it, and the rank would wait for the batch.
    """
    batch = collate(examples)
    tensors = [value for value in vars(batch).values() if isinstance(value, Tensor)]
    _check_open_files(FILES_PER_TENSOR * len(tensors) + MORE_FILES)
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage("/dev/shm").free / 2**20 if Path("/dev/shm").is_dir() else 0
        needed = sum(tensor.nbytes for tensor in tensors) / 2**20
        raise ConfigError(
            f"data.num_workers: found {free:.1f} MiB free in /dev/shm ({error}); expected room for batches of "
            f"{needed:.1f} MiB from every loader process. Start docker with --shm-size=16g or --ipc=host, or set "
            "data.num_workers=0"
        ) from None
    return batch


def _check_open_files(number: int) -> None:
    """Raise RuntimeError if this process cannot open so many files more."""
    opened: list[int] = []
    try:
        for _ in range(number):
            opened.append(os.dup(0))
    except OSError as error:
        if error.errno != errno.EMFILE:
            return
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise RuntimeError(
            f"Too many open files: found room for {len(opened)} more within the limit of {limit}; expected {number} to "
            "send a batch. Raise the limit with `ulimit -n 65536`, build shards of more samples, or set "
            "data.num_workers=0"
        ) from None
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _without_traceback(error: Exception) -> str:
    """Return the message of an error, which a DataLoader replaces by the traceback of its process."""
    return str(error).strip().rpartition("\n")[2].partition(f"{type(error).__name__}: ")[2] or str(error)
