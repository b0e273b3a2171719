"""data.tiles: a photo becomes its tiles; each is a sample of the exact plan."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from test_loader import NUM_SAMPLES, SEED, assert_equal, build_dataset

from cogvlm_ft.config import load_config
from cogvlm_ft.data.collate import Batch
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.loader import GroundingDataset, Item, read_steps
from cogvlm_ft.data.plan import WHOLE, SamplePlan
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.tiling import contents_of, plan_tiles, show_tile, tile_contents
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.grounding.targets import Target
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model import CogVLMTokenizer
from cogvlm_ft.planning.data_turns import mean_looks
from cogvlm_ft.planning.preflight import count_images, count_validation
from cogvlm_ft.tile_settings import TilesConfig

TILES = TilesConfig(side_px=32, overlap=0.2, min_visible=0.6, fully_annotated=True, empty=0.2)  # 2 x 2 of 56 px


def tiled(
    shards: Path, tokenizer: CogVLMTokenizer, tiles: TilesConfig = TILES, wording: str = "box"
) -> GroundingDataset:
    dataset = build_dataset(shards, tokenizer, wording=load_wording(wording))
    return replace(dataset, tiles=tiles, parts=plan_tiles(dataset.reader, dataset.wording, tiles, None, SEED))


def steps_of(dataset: GroundingDataset, consumed: int, rank: int, world_size: int) -> list[list[Batch]]:
    assert dataset.parts is not None
    plan = SamplePlan(len(dataset.parts), 12, SEED)
    steps = read_steps(dataset, plan, consumed, rank=rank, world_size=world_size, micro_batch_size=2, num_workers=0)
    return list(steps)


def target(phrase: str, *boxes: tuple[float, float, float, float]) -> Target:
    return Target(phrase, "en", boxes)


def test_what_is_asked_in_a_tile_what_is_absent_and_what_is_neither() -> None:
    whole, mostly, little = (
        target("cat", (10, 10, 30, 30)),
        target("dog", (80, 0, 110, 20)),
        target("cow", (90, 50, 130, 90)),
    )
    targets = [whole, mostly, little, target("pig", (300, 0, 320, 20)), target("fox"), target("left hen", (1, 1, 9, 9))]
    for phrase in ("largest rat", "bigger rat", "rat behind it", "最大的猫", "更大的猫", "前面的猫"):
        targets.append(target(phrase, (40, 40, 50, 50)))
    (found,) = tile_contents(targets, [(0, 0, 100, 100)], 0.6, True)
    assert found.asked == (whole, target("dog", (80, 0, 100, 20))), "two thirds of the dog are inside; clipped"
    assert found.absent == (target("pig"), target("fox")), "neither the cow, a quarter of which is inside"
    assert found.is_unclear
    (partial,) = tile_contents(targets, [(0, 0, 100, 100)], 0.6, False)
    assert partial.absent == (target("fox"),)
    same = [target("cat", (10, 10, 30, 30)), target("cat", (90, 50, 130, 90)), target("black cat", (300, 0, 320, 20))]
    (none,) = tile_contents(same, [(0, 0, 100, 100)], 0.6, True)
    assert (none.asked, none.absent) == ((), ()), "another cat is cut, and it may be black"


def test_every_box_is_asked_and_each_tile_with_a_target_is_a_sample(shards: Path, tokenizer: CogVLMTokenizer) -> None:
    for is_whole in (True, False):
        dataset = tiled(shards, tokenizer, replace(TILES, whole=is_whole))
        assert dataset.parts is not None
        views: dict[int, list[int]] = {}
        for sequence in range(len(dataset.parts)):
            photo, part = dataset.parts.find(sequence)
            views.setdefault(photo, []).append(part.tile)
        assert sorted(views) == list(range(len(dataset.reader))) and len(dataset.parts) > 2 * len(dataset.reader)
        num_empty = num_shown = 0
        for photo, shown in views.items():
            record = dataset.reader.read(photo).record
            assert len(set(shown)) == len(shown) and (WHOLE in shown or not is_whole)
            asked = {each for tile in shown for each in asked_in(dataset, photo, tile)}
            assert {each.phrase for each in record.targets if each.boxes_xyxy} <= asked
            num_shown += sum(bool(asked_in(dataset, photo, tile)) for tile in shown if tile != WHOLE)
            num_empty += sum(not asked_in(dataset, photo, tile) for tile in shown if tile != WHOLE)
        assert num_empty == round(num_shown / 4), "a fifth of all tiles"


def asked_in(dataset: GroundingDataset, photo: int, tile: int) -> set[str]:
    record, _ = show_tile(dataset.reader.read(photo).record, tile, dataset.tiles, seed=SEED, epoch=0)
    return {each.phrase for each in record.targets if each.boxes_xyxy}


def test_one_number_is_the_position_for_every_number_of_ranks(shards: Path, tokenizer: CogVLMTokenizer) -> None:
    dataset = tiled(shards, tokenizer)
    assert dataset.parts is not None
    alone = steps_of(dataset, 0, 0, 1)
    resumed = steps_of(dataset, 24, 0, 1)
    for step, other in zip(alone[2:], resumed, strict=True):
        for one, same in zip(step, other, strict=True):
            assert_equal(one, same)
    ranks = [steps_of(dataset, 0, rank, 2) for rank in (0, 1)]
    rows = [Counter(rows_of(steps)) for steps in (alone, ranks[0] + ranks[1])]
    assert rows[0] == rows[1] and sum(rows[0].values()) == len(dataset.parts)
    other = tiled(shards, tokenizer, replace(TILES, min_visible=0.5)).parts
    assert other is not None and other.sha256 != dataset.parts.sha256


def rows_of(steps: list[list[Batch]]) -> list[tuple[str, tuple[int, ...], float]]:
    batches = [batch for step in steps for batch in step]
    assert not any(batch.bad for batch in batches)
    return [
        (
            key,
            tuple(ids for ids in batch.input_ids[row].tolist() if ids),
            round(batch.pixel_values[row].sum().item(), 2),
        )
        for batch in batches
        for row, key in enumerate(batch.keys)
        if batch.weight[row] > 0
    ]


@pytest.mark.parametrize("wording", ["region", "mixed"])
def test_every_wording_asks_about_tiles(shards: Path, tokenizer: CogVLMTokenizer, wording: str) -> None:
    dataset = tiled(shards, tokenizer, wording=wording)
    assert dataset.parts is not None
    in_tiles = [i for i in range(len(dataset.parts)) if dataset.parts.find(i)[1].tile != WHOLE]
    for sequence in in_tiles[::3]:
        example = dataset[Item(1, sequence, 1.0)]
        assert example.weight == 1 and example.num_turns > 0 and example.bad is None


def test_the_plan_of_a_run_counts_tiles_and_without_them_nothing_changes(
    shards: Path, tokenizer: CogVLMTokenizer
) -> None:
    settings = ["output_dir=a", "model.path=b", f"data.shards={shards}", f"seed={SEED}", "data.wording=box"]
    plain = load_config(None, settings)
    assert (count_images(plain), mean_looks(plain)) == (NUM_SAMPLES, 1)
    fields = {**vars(TILES)}
    config = load_config(None, [*settings, *(f"data.tiles.{name}={value}" for name, value in fields.items())])
    assert config.data.tiles == TILES
    parts = tiled(shards, tokenizer).parts
    assert parts is not None and (count_images(config), mean_looks(config)) == (len(parts), 5)
    assert count_validation(config) == 9


def test_only_fully_annotated_sources_have_absent_targets_of_their_other_tiles(
    shards: Path, tokenizer: CogVLMTokenizer, tmp_path: Path
) -> None:
    """The same photos as two sources; of the one annotated in part only the records' own targets are absent."""
    sources = [shutil.copytree(shards, tmp_path / name) for name in ("full", "part")]
    reader = ShardReader(load_index([{"path": str(path), "weight": 1.0} for path in sources], "train"))
    tiles, wording = replace(TILES, partly_annotated=["part"]), load_wording("box")
    records = {reader.index.key(i): reader.read(i).record for i in range(len(reader))}
    absent = {
        key: {target.phrase for content in contents_of(record, tiles) for target in content.absent}
        for key, record in records.items()
    }
    own = {key: {each.phrase for each in record.targets if not each.boxes_xyxy} for key, record in records.items()}
    assert all(absent[key] == own[key] for key in records if key.startswith("part/"))
    assert any(absent[key] > own[key] for key in records if key.startswith("full/"))
    plans = [plan_tiles(reader, wording, each, None, SEED) for each in (tiles, TILES)]
    assert plans[0].sha256 != plans[1].sha256 and "partly" not in plans[1].rules, "as of runs before this setting"
    with pytest.raises(ConfigError, match="partly_annotated: found 'web'; expected names of full, part"):
        plan_tiles(reader, wording, replace(TILES, partly_annotated=["web"]), None, SEED)
