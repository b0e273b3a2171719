"""Examples and batches of a real shard set: a pure function of seed, epoch and position."""

from __future__ import annotations

import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvlm_ft.data import loader
from cogvlm_ft.data.collate import BadSample, Batch, collate
from cogvlm_ft.data.encode import encode_turns
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.loader import GroundingDataset, Item, read_steps
from cogvlm_ft.data.look import turns_of
from cogvlm_ft.data.patience import start_loader_process
from cogvlm_ft.data.plan import SamplePlan
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.record import Record
from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.grounding.targets import Target, Turn
from cogvlm_ft.grounding.wording import LanguageWording, Wording, load_wording
from cogvlm_ft.model import CogVLMConfig, CogVLMTokenizer, preprocess_image

SEED = 3
NUM_SAMPLES = 33
GLOBAL_BATCH_SIZE = 12
NUM_STEPS = 3  # the last one has 9 samples and 3 that fill it up
MICRO_BATCH_SIZES = {1: 1, 2: 3, 3: 2}  # by world size

NOT_AN_IMAGE = b"\xff" * 40
NOT_JSON = b"{"
WITH_BRACKETS = b'{"targets":[{"phrase":"a sign: [[1]]","boxes_xyxy":[[1,2,30,40]]}]}'


def build_dataset(shards: Path, tokenizer: CogVLMTokenizer, **changes: Any) -> GroundingDataset:
    vision = {"image_size": 28, "num_positions": 5}
    fields: dict[str, Any] = {
        "reader": ShardReader(load_index(shards, "train")),
        "wording": load_wording("box"),
        "tokenizer": tokenizer,
        "config": CogVLMConfig(vocab_size=len(tokenizer), template_version="chat", vision_config=vision),
        "seed": SEED,
        "max_sequence_length": 4096,
    }
    return GroundingDataset(**(fields | changes))


@pytest.fixture
def dataset(shards: Path, tokenizer: CogVLMTokenizer) -> GroundingDataset:
    return build_dataset(shards, tokenizer)


@pytest.fixture
def own_shards(shards: Path, tmp_path: Path) -> Path:
    """Copy the shards, so that a test may damage them."""
    return Path(shutil.copytree(shards, tmp_path / "shards"))


def overwrite(shards: Path, i: int, part: str, data: bytes) -> str:
    """Write `data` over the "image" or "json" bytes of training sample i; return its key."""
    index = load_index(shards, "train")
    offset, size = (int(getattr(index, f"{part}_{what}")[i]) for what in ("offset", "num_bytes"))
    assert len(data) <= size
    with index.shard_paths[index.shard_number[i]].open("r+b") as file:
        file.seek(offset)
        file.write(data.ljust(size))
    return index.key(i)


def assert_equal(found: Batch, expected: Batch) -> None:
    """Compare bit for bit."""
    for name, value in vars(expected).items():
        other = getattr(found, name)
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value, name


def test_an_example_holds_the_photo_and_all_its_turns(dataset: GroundingDataset) -> None:
    assert len(dataset.reader) == NUM_SAMPLES
    num_turns = set()
    for i in range(NUM_SAMPLES):
        found = dataset[Item(epoch=2, index=i, weight=1.0)]
        sample = dataset.reader.read(i)
        turns = turns_of(sample.record, dataset.wording, seed=SEED, epoch=2)
        assert (found.key, found.weight, found.bad) == (sample.record.key, 1.0, None)
        assert found.num_turns == len(turns) == len(sample.record.turns) + len(sample.record.targets)
        assert torch.equal(found.pixel_values, preprocess_image(sample.image, 28))
        expected = encode_turns(turns, dataset.tokenizer, dataset.config)
        assert all(torch.equal(getattr(found.sequences, name), value) for name, value in vars(expected).items())
        num_turns.add(found.num_turns)
    assert len(num_turns) > 2


def test_the_same_item_is_the_same_example_in_every_process(
    dataset: GroundingDataset, shards: Path, tokenizer: CogVLMTokenizer
) -> None:
    other = build_dataset(shards, tokenizer)
    other[Item(0, 4, 1.0)]
    for i in reversed(range(NUM_SAMPLES)):
        assert_equal(collate([other[Item(1, i, 1.0)]]), collate([dataset[Item(1, i, 1.0)]]))


def test_another_epoch_or_seed_words_the_turns_anew(
    dataset: GroundingDataset, shards: Path, tokenizer: CogVLMTokenizer
) -> None:
    other_seed = build_dataset(shards, tokenizer, seed=SEED + 1)

    def ids(source: GroundingDataset, epoch: int) -> list[list[int]]:
        return [source[Item(epoch, i, 1.0)].sequences.input_ids.tolist() for i in range(NUM_SAMPLES)]

    first = ids(dataset, 0)
    for others in (ids(dataset, 1), ids(other_seed, 0)):
        assert sum(other != one for other, one in zip(others, first, strict=True)) > NUM_SAMPLES / 2


def test_the_user_s_own_turns_come_first_word_for_word() -> None:
    own = (Turn("what?", "that [[1]]"), Turn("and?", "this"))
    record = Record("k", (40, 30), "", (Target("dog", "en", ()), Target("狗", "zh", ((0.0, 0.0, 40.0, 30.0),))), own)
    for epoch in range(5):
        turns = turns_of(record, load_wording("box"), seed=0, epoch=epoch)
        assert turns[:2] == list(own)
        assert {turn.target for turn in turns[2:]} == set(record.targets)
        assert {turn.answer for turn in turns[2:]} == {"The specified target was not found.", "[[000,000,975,966]]"}


@pytest.mark.parametrize(
    ("part", "data", "reason"),
    [
        ("image", NOT_AN_IMAGE, "broken_image"),
        ("json", NOT_JSON, "bad_json"),
        ("json", WITH_BRACKETS, "unusable_turn"),
    ],
)
def test_a_bad_sample_is_reported_and_its_place_filled(
    own_shards: Path, tokenizer: CogVLMTokenizer, part: str, data: bytes, reason: str
) -> None:
    key = overwrite(own_shards, 5, part, data)
    dataset = build_dataset(own_shards, tokenizer, wording=load_wording("description"))
    before, found, neighbour = (dataset[Item(0, i, 1.0)] for i in (4, 5, 6))
    assert before.bad is None
    assert found.bad == BadSample(key, reason)
    assert (found.key, found.weight) == (neighbour.key, 0.0)
    assert torch.equal(found.pixel_values, neighbour.pixel_values)
    batch = collate([before, found, neighbour])
    assert batch.weight.tolist() == [1.0, 0.0, 1.0]
    assert set(batch.labels[1].tolist()) == {-100}
    assert batch.bad == [BadSample(key, reason)]
    assert batch.num_turns == before.num_turns + neighbour.num_turns


def test_the_neighbour_of_the_last_sample_is_the_first_good_one(own_shards: Path, tokenizer: CogVLMTokenizer) -> None:
    overwrite(own_shards, 0, "image", NOT_AN_IMAGE)
    key = overwrite(own_shards, NUM_SAMPLES - 1, "image", NOT_AN_IMAGE)
    dataset = build_dataset(own_shards, tokenizer)
    found = dataset[Item(0, NUM_SAMPLES - 1, 1.0)]
    assert (found.bad, found.key) == (BadSample(key, "broken_image"), dataset.reader.index.key(1))


def test_samples_longer_than_the_limit_are_bad(
    dataset: GroundingDataset, shards: Path, tokenizer: CogVLMTokenizer
) -> None:
    items = [Item(0, i, 1.0) for i in range(NUM_SAMPLES)]
    lengths = [len(dataset[item].sequences.input_ids) for item in items]
    limit = sorted(lengths)[NUM_SAMPLES // 2]
    short = build_dataset(shards, tokenizer, max_sequence_length=limit)
    too_long = []
    for item, length in zip(items, lengths, strict=True):
        found = short[item]
        assert len(found.sequences.input_ids) <= limit
        assert found.bad == (BadSample(dataset[item].key, "too_long") if length > limit else None)
        if found.bad:
            assert found.bad.detail == f"{length} tokens; expected at most data.max_sequence_length={limit}"
        too_long.append(length > limit)
    assert any(too_long) and not all(too_long)


def test_a_wording_without_a_language_stops_the_run(shards: Path, tokenizer: CogVLMTokenizer) -> None:
    wording = Wording("chinese only", {"zh": LanguageWording(("{phrase}?",), ("{boxes}",), "no")})
    dataset = build_dataset(shards, tokenizer, wording=wording)
    with pytest.raises(ConfigError, match="chinese only has zh, but sample scene-"):
        [dataset[Item(0, i, 1.0)] for i in range(NUM_SAMPLES)]


def test_when_nothing_can_be_used_the_run_stops(shards: Path, tokenizer: CogVLMTokenizer) -> None:
    dataset = build_dataset(shards, tokenizer, max_sequence_length=10)
    with pytest.raises(DataError, match=rf"{NUM_SAMPLES} samples in a row .*too_long"):
        dataset[Item(0, 2, 1.0)]


def steps_of(
    dataset: GroundingDataset, consumed: int, rank: int = 0, world_size: int = 1, num_workers: int = 0
) -> list[list[Batch]]:
    steps = read_steps(
        dataset,
        SamplePlan(NUM_SAMPLES, GLOBAL_BATCH_SIZE, SEED),
        consumed,
        rank=rank,
        world_size=world_size,
        micro_batch_size=MICRO_BATCH_SIZES[world_size],
        num_workers=num_workers,
    )
    return list(steps)


def batches_of(dataset: GroundingDataset, consumed: int, world_size: int = 1, num_workers: int = 0) -> list[Batch]:
    """Collect the batches of all ranks."""
    ranks = [steps_of(dataset, consumed, rank, world_size, num_workers) for rank in range(world_size)]
    return [batch for steps in ranks for step in steps for batch in step]


def counted_keys(batches: list[Batch]) -> list[str]:
    """List the keys of weight 1."""
    return [key for batch in batches for key, weight in zip(batch.keys, batch.weight.tolist(), strict=True) if weight]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sample_counts_once_an_epoch(dataset: GroundingDataset, world_size: int, num_workers: int) -> None:
    batches = batches_of(dataset, 0, world_size, num_workers)
    assert Counter(counted_keys(batches)) == Counter(dataset.reader.index.key(i) for i in range(NUM_SAMPLES))
    num_fillers = sum((batch.weight == 0).sum().item() for batch in batches)
    assert num_fillers == NUM_STEPS * GLOBAL_BATCH_SIZE - NUM_SAMPLES
    for batch in batches:
        assert set(batch.labels[batch.weight == 0].flatten().tolist()) <= {-100}
        assert not batch.bad


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_ranks_make_the_same_steps(dataset: GroundingDataset, world_size: int) -> None:
    num_micro_batches = GLOBAL_BATCH_SIZE // (world_size * MICRO_BATCH_SIZES[world_size])
    for rank in range(world_size):
        steps = steps_of(dataset, 0, rank, world_size)
        assert [len(step) for step in steps] == [num_micro_batches] * NUM_STEPS
        assert {len(batch.keys) for step in steps for batch in step} == {MICRO_BATCH_SIZES[world_size]}


def test_a_step_holds_the_same_samples_on_any_number_of_ranks(dataset: GroundingDataset) -> None:
    by_world_size = []
    for world_size in (1, 2, 3):
        ranks = [steps_of(dataset, 0, rank, world_size) for rank in range(world_size)]
        by_world_size.append(
            [sorted(key for steps in ranks for key in counted_keys(steps[step])) for step in range(NUM_STEPS)]
        )
    assert by_world_size[0] == by_world_size[1] == by_world_size[2]
    assert [len(keys) for keys in by_world_size[0]] == [12, 12, 9]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_resumed_rank_sees_the_very_same_batches(
    shards: Path, tokenizer: CogVLMTokenizer, world_size: int, num_workers: int
) -> None:
    rank = world_size - 1
    for epoch in (0, 1):
        whole = steps_of(build_dataset(shards, tokenizer), epoch * NUM_SAMPLES, rank, world_size)
        for num_done in range(NUM_STEPS):
            consumed = epoch * NUM_SAMPLES + num_done * GLOBAL_BATCH_SIZE
            rest = steps_of(build_dataset(shards, tokenizer), consumed, rank, world_size, num_workers)
            assert len(rest) == NUM_STEPS - num_done
            for found, expected in zip(rest, whole[num_done:], strict=True):
                for found_batch, expected_batch in zip(found, expected, strict=True):
                    assert_equal(found_batch, expected_batch)


def test_resuming_between_two_steps_goes_on_with_the_next_sample(dataset: GroundingDataset) -> None:
    """Change the global batch size: other batches, the same samples in the same order."""
    expected = counted_keys(batches_of(dataset, 0))
    for consumed in range(0, NUM_SAMPLES, 4):
        assert counted_keys(batches_of(dataset, consumed)) == expected[consumed:]


def test_epochs_have_different_orders(dataset: GroundingDataset) -> None:
    first, second = (counted_keys(batches_of(dataset, start)) for start in (0, NUM_SAMPLES))
    assert first != second
    assert sorted(first) == sorted(second)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("place", [0, 5], ids=["also fills the last batch", "elsewhere"])
def test_a_bad_sample_is_counted_once_an_epoch(
    own_shards: Path, tokenizer: CogVLMTokenizer, place: int, num_workers: int
) -> None:
    spoiled = int(SamplePlan(NUM_SAMPLES, GLOBAL_BATCH_SIZE, SEED).order(epoch=0)[place])
    key = overwrite(own_shards, spoiled, "image", NOT_AN_IMAGE)
    dataset = build_dataset(own_shards, tokenizer)
    batches = batches_of(dataset, 0, world_size=2, num_workers=num_workers)
    good_keys = [dataset.reader.index.key(i) for i in range(NUM_SAMPLES) if i != spoiled]
    assert Counter(counted_keys(batches)) == Counter(good_keys)
    assert [bad for batch in batches for bad in batch.bad] == [BadSample(key, "broken_image")]


def test_a_signal_while_loader_processes_start_ends_none_of_them(
    shards: Path, tokenizer: CogVLMTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm, docker and deepspeed send SIGTERM to them too, and torch lets it be deadly at first."""

    def signalled_start(worker: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        start_loader_process(worker)

    monkeypatch.setattr(loader, "start_loader_process", signalled_start)
    assert len(steps_of(build_dataset(shards, tokenizer), 0, num_workers=1)) == -(-NUM_SAMPLES // GLOBAL_BATCH_SIZE)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
