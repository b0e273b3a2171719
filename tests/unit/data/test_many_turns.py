"""data.max_turns_per_image: an image with many turns is split into several sequences; every turn is in exactly one."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_loader import NOT_AN_IMAGE, NUM_SAMPLES, SEED, assert_equal, build_dataset, overwrite

from cogvlm_ft.data.collate import BadSample, Batch
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.loader import GroundingDataset, Item, most_turns_of, read_steps
from cogvlm_ft.data.look import turns_of
from cogvlm_ft.data.plan import SamplePlan, TurnsPart, plan_samples, split_photos
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model import CogVLMTokenizer

MAX_TURNS = 2
WORDINGS = ("box", "detection", "region", "steps", "conversation", "mixed")


def split_dataset(
    shards: Path, tokenizer: CogVLMTokenizer, wording: str = "conversation", max_turns: int = MAX_TURNS
) -> GroundingDataset:
    dataset = build_dataset(shards, tokenizer, wording=load_wording(wording))
    return replace(dataset, parts=split_photos(most_turns_of(dataset.reader, dataset.wording), max_turns))


def steps_of(dataset: GroundingDataset, consumed: int, rank: int = 0, world_size: int = 1) -> list[list[Batch]]:
    assert dataset.parts is not None
    plan = SamplePlan(len(dataset.parts), 12, SEED)
    steps = read_steps(
        dataset, plan, consumed, rank=rank, world_size=world_size, micro_batch_size=2, num_workers=rank % 2
    )
    return list(steps)


def turns_in(batches: list[Batch]) -> Counter[tuple[str, tuple[int, ...]]]:
    """List (key, tokens) of every labelled turn."""
    found: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for batch in batches:
        num_turns = 0
        for row, key in enumerate(batch.keys):
            if batch.weight[row] > 0:
                blocks = batch.block_ids[row]
                for block in range(1, int(blocks.max()) + 1):
                    found[key, tuple(batch.input_ids[row][blocks == block].tolist())] += 1
                    num_turns += 1
        assert num_turns == batch.num_turns
    return found


def turns_of_epoch(dataset: GroundingDataset, epoch: int) -> Counter[tuple[str, tuple[int, ...]]]:
    """List the same for every image with all its turns in one sequence."""
    whole = replace(dataset, parts=None)
    items = [[Item(epoch, i, 1.0)] for i in range(len(dataset.reader))]
    plan = SamplePlan(len(items), 1, SEED)
    steps = read_steps(whole, plan, epoch * len(items), rank=0, world_size=1, micro_batch_size=1, num_workers=0)
    return turns_in([batch for step in steps for batch in step])


@pytest.mark.slow
@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.integers(1, 9), st.data())
def test_every_turn_is_in_one_part_and_no_part_has_too_many(most: list[int], limit: int, data: st.DataObject) -> None:
    parts = split_photos(np.array(most), limit)
    turns = [list(range(data.draw(st.integers(0, most_here)))) for most_here in most]
    seen: list[list[int]] = [[] for _ in most]
    for sequence in range(len(parts)):
        photo, part = parts.find(sequence)
        here = turns[photo][part.cut]
        assert len(here) <= limit
        seen[photo] += here
    assert [sorted(each) for each in seen] == turns
    assert len(parts) == sum(max(1, -(-number // limit)) for number in most), "no more sequences than needed"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.data())
def test_the_sequences_of_a_source_stand_together(most: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(most)))
    parts = split_photos(np.array(most), 2)
    first, second = parts.source_sizes([cut, len(most) - cut])
    assert first + second == len(parts)
    assert [parts.find(i)[0] < cut for i in range(len(parts))] == [True] * first + [False] * second


def test_photos_within_the_limit_are_one_sequence_each() -> None:
    parts = split_photos(np.array([0, 7, 300]), 300)
    assert [parts.find(i) for i in range(len(parts))] == [(i, TurnsPart(0, 1)) for i in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("wording", WORDINGS)
def test_every_turn_exactly_once_an_epoch(shards: Path, tokenizer: CogVLMTokenizer, wording: str) -> None:
    dataset = split_dataset(shards, tokenizer, wording)
    assert dataset.parts is not None
    plan = SamplePlan(len(dataset.parts), 12, SEED)
    for epoch in (0, 1):
        ranks = [steps_of(dataset, epoch * len(dataset.parts), rank, world_size=2) for rank in (0, 1)]
        assert [len(steps) for steps in ranks] == [plan.steps_per_epoch] * 2
        batches = [batch for steps in ranks for step in steps for batch in step]
        assert turns_in(batches) == turns_of_epoch(dataset, epoch)
        assert all(int(batch.block_ids.max()) <= MAX_TURNS for batch in batches)
        assert not any(batch.bad for batch in batches)


def test_all_sequences_of_a_photo_show_it_as_one(shards: Path, tokenizer: CogVLMTokenizer) -> None:
    dataset = split_dataset(shards, tokenizer, max_turns=1)
    assert dataset.parts is not None and len(dataset.parts) > 2 * NUM_SAMPLES
    by_key: dict[str, set[tuple[float, ...]]] = {}
    for i in range(len(dataset.parts)):
        example = dataset[Item(3, i, 1.0)]
        by_key.setdefault(example.key, set()).add(tuple(example.pixel_values.flatten().tolist()))
    assert len(by_key) == NUM_SAMPLES and all(len(pixels) == 1 for pixels in by_key.values())


def test_boxes_that_answers_leave_out_are_counted_once(shards: Path, tokenizer: CogVLMTokenizer) -> None:
    """Count as with all turns of an image in one sequence."""
    wording = replace(load_wording("conversation"), max_boxes=1)
    whole = build_dataset(shards, tokenizer, wording=wording)
    dataset = replace(whole, parts=split_photos(most_turns_of(whole.reader, wording), 1))
    expected = sum(whole[Item(0, i, 1.0)].num_cut_boxes for i in range(NUM_SAMPLES))
    batches = [batch for step in steps_of(dataset, 0) for batch in step]
    assert sum(batch.num_cut_boxes for batch in batches) == expected


def test_a_part_that_gets_nothing_weighs_nothing(shards: Path, tokenizer: CogVLMTokenizer) -> None:
    """Leave parts empty by a wording of one turn or many; their padding has no labels."""
    dataset = split_dataset(shards, tokenizer, "mixed", max_turns=1)
    assert dataset.parts is not None
    num_empty = 0
    for i in range(len(dataset.parts)):
        photo, part = dataset.parts.find(i)
        turns = turns_of(dataset.reader.read(photo).record, dataset.wording, seed=SEED, epoch=0)
        example = dataset[Item(0, i, 1.0)]
        is_empty = part.number >= len(turns)
        num_empty += is_empty
        assert example.bad is None and example.weight == (0.0 if is_empty else 1.0)
        assert int(example.sequences.block_ids.max()) == 1
    assert 0 < num_empty < len(dataset.parts) / 2


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_resumed_anywhere_sees_what_it_would_have_seen(
    shards: Path, tokenizer: CogVLMTokenizer, world_size: int
) -> None:
    dataset = split_dataset(shards, tokenizer)
    whole = steps_of(dataset, 0, world_size - 1, world_size)
    for num_done in range(1, len(whole), 2):
        rest = steps_of(split_dataset(shards, tokenizer), 12 * num_done, world_size - 1, world_size)
        for found, expected in zip(rest, whole[num_done:], strict=True):
            for found_batch, expected_batch in zip(found, expected, strict=True):
                assert_equal(found_batch, expected_batch)


def test_after_a_resume_with_other_ranks_no_turn_is_missed_or_seen_twice(
    shards: Path, tokenizer: CogVLMTokenizer
) -> None:
    dataset = split_dataset(shards, tokenizer)
    before = [batch for step in steps_of(dataset, 0)[:2] for batch in step]
    after = [batch for rank in range(3) for step in steps_of(dataset, 24, rank, 3) for batch in step]
    assert turns_in(before + after) == turns_of_epoch(dataset, 0)


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0])
def test_weighted_sources_show_every_turn_once_a_pass(
    shards: Path, tokenizer: CogVLMTokenizer, weight: float, tmp_path: Path
) -> None:
    """Draw one pass in two epochs of weight 0.5, two passes in one of weight 2."""
    shutil.copytree(shards, tmp_path / "again")
    index = load_index(
        [{"path": str(shards), "weight": weight}, {"path": str(tmp_path / "again"), "weight": 1.0}], "train"
    )
    dataset = build_dataset(shards, tokenizer, reader=ShardReader(index), wording=load_wording("conversation"))
    parts = split_photos(most_turns_of(dataset.reader, dataset.wording), MAX_TURNS)
    sizes = parts.source_sizes(index.source_sizes)
    plan = plan_samples(sizes, index.source_weights, global_batch_size=8, seed=SEED)
    assert plan.num_samples == round(weight * sizes[0]) + sizes[1]
    seen: Counter[tuple[int, int]] = Counter()
    for epoch in (0, 1):
        for offset in range(0, plan.num_samples, 8):
            batch = plan.global_batch(epoch, offset)
            seen.update(
                (int(i), int(p)) for i, p, w in zip(batch.indices, batch.passes, batch.weights, strict=True) if w
            )
    num_passes = round(2 * weight)
    first = {(i, p) for i in range(sizes[0]) for p in range(num_passes)}
    second = {(i, p) for i in range(sizes[0], len(parts)) for p in range(2)}
    if 2 * round(weight * sizes[0]) == num_passes * sizes[0]:
        assert seen == Counter(first | second)
    else:  # an odd number of sequences has no halves: one begins the next pass
        assert max(seen.values()) == 1 and set(seen) >= first | second


@pytest.mark.parametrize("scanned", [False, True], ids=["offsets files of before", "tars of others"])
def test_what_the_index_does_not_know_is_read_from_the_records(
    shards: Path,
    tokenizer: CogVLMTokenizer,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    scanned: bool,
) -> None:
    monkeypatch.setattr("cogvlm_ft.terminal.LINE_S", 0.0)  # what takes no time is not shown
    known = most_turns_of(ShardReader(load_index(shards, "train")), load_wording("mixed"))
    assert "count questions" not in capfd.readouterr().err
    folder = Path(shutil.copytree(shards, tmp_path / "older"))
    for path in folder.glob("train-*.json"):
        content = json.loads(path.read_bytes())
        for row in content["samples"]:
            del row["num_questions"]
        path.write_text(json.dumps(content))
        if scanned:
            path.unlink()
    index = load_index(folder, "train")
    assert set(index.num_targets.tolist()) == set(index.num_turns.tolist()) == {-1}
    assert most_turns_of(ShardReader(index), load_wording("mixed")).tolist() == known.tolist()
    assert "count questions: 33/33" in capfd.readouterr().err


def test_a_bad_photo_is_reported_for_each_of_its_sequences(
    shards: Path, tokenizer: CogVLMTokenizer, tmp_path: Path
) -> None:
    """Count them as the plan counts; their replacements obey the limit too."""
    folder = Path(shutil.copytree(shards, tmp_path / "shards"))
    photo = 3  # with four targets, and as many in the next
    key = overwrite(folder, photo, "image", NOT_AN_IMAGE)
    dataset = split_dataset(folder, tokenizer)
    assert dataset.parts is not None
    mine = [i for i in range(len(dataset.parts)) if dataset.parts.find(i)[0] == photo]
    for i in mine:
        example = dataset[Item(0, i, 1.0)]
        assert example.bad == BadSample(key, "broken_image") and example.weight == 0
        assert example.key == dataset.reader.index.key(photo + 1) and example.num_turns <= MAX_TURNS


def test_a_bad_record_has_one_sequence(shards: Path, tokenizer: CogVLMTokenizer, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "shards"))
    for path in folder.glob("*.json"):
        path.unlink()
    key = overwrite(folder, 3, "json", b"{")
    dataset = split_dataset(folder, tokenizer)
    assert dataset.parts is not None
    [mine] = [i for i in range(len(dataset.parts)) if dataset.parts.find(i)[0] == 3]
    assert dataset[Item(0, mine, 1.0)].bad == BadSample(key, "bad_json")
