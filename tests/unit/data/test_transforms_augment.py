"""Augmented training samples: texts and boxes stay true, and the same sample always looks the same."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_loader import NUM_SAMPLES, SEED, assert_equal, build_dataset, steps_of
from test_reader import write_shard

from cogvlm_ft.config import AugmentConfig, DataConfig, load_config
from cogvlm_ft.data.augment import Colours, augments, choose_look, crop, draft_side
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.loader import Item
from cogvlm_ft.data.mentions import mentions_colour, mentions_place, mentions_side
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.record import Record
from cogvlm_ft.data.transforms import Frame, photo_frame
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.grounding.boxes import parse_boxes
from cogvlm_ft.grounding.targets import Box, Target, Turn
from cogvlm_ft.grounding.wording import LanguageWording, Wording
from cogvlm_ft.model import CogVLMConfig, CogVLMTokenizer
from cogvlm_ft.model.preprocess import MEAN, STD

ALL = AugmentConfig(crop=0.7, min_crop=0.3, flip=0.5, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1)
PHOTO_PX = (320, 240)


def record_of(*boxes: Box, phrase: str = "the dog", key: str = "k", turns: tuple[Turn, ...] = ()) -> Record:
    return Record(key, PHOTO_PX, "s", (Target(phrase, "en", boxes), Target("the cat", "en", ())), turns)


def looks(record: Record, settings: AugmentConfig, turns: tuple[Turn, ...] = ()) -> list[tuple[Frame, Colours]]:
    """Of many epochs."""
    return [choose_look(record, turns, settings, "squash", seed=0, epoch=epoch) for epoch in range(60)]


def test_nothing_is_augmented_unless_asked_for() -> None:
    config = load_config(None, ["model.path=m", "data.shards=s", "output_dir=o"])
    assert not augments(config.data.augment) and augments(ALL)
    whole = photo_frame(PHOTO_PX, "squash"), Colours()
    assert looks(record_of((1, 2, 30, 40)), config.data.augment) == [whole] * 60


def test_a_crop_keeps_every_box_of_every_target_whole() -> None:
    rng = random.Random(0)
    num_cropped = 0
    for number in range(200):
        boxes = []
        for _ in range(rng.randint(1, 3)):
            x0, y0 = rng.uniform(0, 300), rng.uniform(0, 220)
            boxes.append((x0, y0, rng.uniform(x0 + 1, 320), rng.uniform(y0 + 1, 240)))
        record = record_of(*boxes, key=f"k{number}")
        frame, _ = choose_look(record, (), replace(ALL, crop=1), "squash", seed=0, epoch=0)
        num_cropped += frame.size_px != PHOTO_PX
        left, top, right, bottom = frame.window_px
        assert left >= 0 and top >= 0 and right <= 320 and bottom <= 240, "never beyond the photo"
        width, height = frame.size_px
        for x0, y0, x1, y1 in frame.apply_boxes(boxes):
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    assert num_cropped > 50


def test_a_photo_without_present_targets_is_cropped_too() -> None:
    frames = [frame for frame, _ in looks(record_of(), replace(ALL, crop=1))]
    assert len({frame.window_px for frame in frames}) > 40
    assert all(frame.window_px[0] >= 0 and frame.window_px[3] <= 240 for frame in frames)


def test_crops_enlarge_small_targets() -> None:
    """A frame of half the size or less is as frequent as a larger one; never below min_crop."""
    box = (100.0, 100.0, 108.0, 106.0)
    shares = [frame.size_px[0] / 320 for frame, _ in looks(record_of(box), replace(ALL, crop=1, min_crop=0.25))]
    assert min(shares) >= 0.25 and min(shares) < 0.35
    assert 20 <= sum(share < 0.52 for share in shares) <= 40
    assert np.mean([1 / share**2 for share in shares]) > 4, "times its area, on average"


def test_a_crop_goes_no_further_than_a_large_target() -> None:
    assert crop(photo_frame(PHOTO_PX, "squash"), [(0, 5, 320, 20)], 0.2, random.Random(0)).window_px == (0, 0, 320, 240)
    for seed in range(20):
        x0, _, x1, _ = crop(photo_frame(PHOTO_PX, "squash"), [(3, 5, 163, 20)], 0.2, random.Random(seed)).window_px
        assert x0 == 0 and x1 in (160, 168)


@pytest.mark.parametrize("place", ["phrase", "description", "prompt", "answer", "history"])
@pytest.mark.parametrize("text", ["the dog on the left", "左边的狗", "Right one", "顺时针", "the second dog"])
def test_no_mirror_where_a_text_mentions_a_side(place: str, text: str) -> None:
    record, turns = record_of((100, 100, 108, 106)), (Turn("where?", "there"),)
    settings = AugmentConfig(flip=1)
    assert all(frame.mirrored for frame, _ in looks(record, settings, turns))
    if place in ("phrase", "description"):
        targets = (record.targets[0], replace(record.targets[1], **{place: text}))  # the absent one
        record = replace(record, targets=targets)
    else:
        turns = (replace(turns[0], **{place: (("q", text),) if place == "history" else text}),)
    assert not any(frame.mirrored for frame, _ in looks(record, settings, turns))


@pytest.mark.parametrize("phrase", ["the cup in the corner", "中间的杯子", "the left one"])
def test_no_crop_where_a_text_mentions_a_place(phrase: str) -> None:
    record = record_of((100, 100, 108, 106), phrase=phrase)
    assert {frame.window_px for frame, _ in looks(record, AugmentConfig(crop=1))} == {(0, 0, 320, 240)}


@pytest.mark.parametrize("phrase", ["a red cup", "红色的杯子", "what colour"])
def test_no_other_hue_where_a_text_mentions_a_colour(phrase: str) -> None:
    for _, colours in looks(record_of((100, 100, 108, 106), phrase=phrase), ALL):
        assert colours.hue == 0 and colours.brightness != 1
    assert all(colours.hue != 0 for _, colours in looks(record_of((100, 100, 108, 106)), ALL))


def test_turns_of_the_user_s_own_keep_the_picture_as_it_is() -> None:
    own = (Turn("how many?", "one"),)
    record = record_of((100, 100, 108, 106), turns=own)
    assert all(frame.is_whole_photo for frame, _ in looks(record, replace(ALL, crop=1, flip=1), own))


@pytest.mark.parametrize(
    ("text", "side", "place", "colour"),
    [
        ("bright copyright outright upright leftover", False, False, False),
        ("bottom_right", True, True, False),
        ("the man in the topleft", True, True, False),
        ("leftmost dog", True, True, False),
        ("a right-handed player", True, True, False),
        ("the guy R", True, True, False),
        ("northeast of the house", True, True, False),
        ("at 3 o'clock", True, True, False),
        ("the 2nd car", True, True, False),
        ("Easter bread, a feast, the coast", False, False, False),
        ("count them first", False, False, False),
        ("the stop sign", False, False, False),
        ("lower shelf", False, True, False),
        ("左转的车", True, True, False),
        ("第三个人", True, True, False),
        ("第一步:数一数", False, False, False),
        ("拿着东西吃西瓜的人", False, False, False),
        ("城东的桥", True, True, False),
        ("东西向的路", True, True, False),
        ("三点钟方向的船", True, True, False),
        ("上方的灯", False, True, False),
        ("桌上的杯子", False, False, False),
        ("角落里的猫", False, True, False),
        ("reddish hair", False, False, True),
        ("darkblue car", False, False, True),
        ("a tired, bored man", False, False, False),
        ("黑猫", False, False, True),
        ("什么颜色的车", False, False, True),
        ("狗", False, False, False),
    ],
)
def test_what_texts_mention(text: str, side: bool, place: bool, colour: bool) -> None:
    assert (mentions_side(text), mentions_place(text), mentions_colour(text)) == (side, place, colour)


def test_colours_change_what_they_name() -> None:
    image = Image.effect_noise((40, 30), 60).convert("RGB")
    image.paste((200, 60, 40), (10, 10, 30, 20))
    before = np.asarray(image, float)
    assert np.array_equal(np.asarray(Colours().apply(image)), np.asarray(image))
    assert np.asarray(Colours(brightness=1.3).apply(image), float).mean() > before.mean() * 1.2
    assert np.asarray(Colours(contrast=0.5).apply(image), float).std() < before.std() * 0.7
    grey = np.asarray(Colours(saturation=0).apply(image), int)
    assert np.ptp(grey, axis=2).max() == 0
    red, green, _ = np.asarray(Colours(hue=1 / 3).apply(image), int)[15, 20]
    assert green > 180 > 70 > red


def test_drafts_leave_the_smallest_crop_enough_pixels() -> None:
    off = DataConfig(shards="s")
    assert draft_side(off, 490) is None
    assert draft_side(replace(off, jpeg_draft=True), 490) == 490
    assert draft_side(replace(off, jpeg_draft=True, augment=ALL), 490) == 1634


def test_a_setting_out_of_range_names_its_key() -> None:
    base = ["model.path=m", "data.shards=s", "output_dir=o"]
    for override in (
        "data.augment.flip=1.5",
        "data.augment.hue=0.6",
        "data.augment.min_crop=0",
        "data.augment.crop=-1",
    ):
        with pytest.raises(ConfigError, match=override.partition("=")[0].replace(".", r"\.")):
            load_config(None, [*base, override])
    with pytest.raises(ConfigError, match=r"data\.resize='crop': wanted one of squash, letterbox"):
        load_config(None, [*base, "data.resize=crop"])


def test_augmented_samples_are_the_same_in_every_process_and_differ_between_epochs(
    shards: Path, tokenizer: CogVLMTokenizer
) -> None:
    dataset, other = (build_dataset(shards, tokenizer, augment=ALL) for _ in range(2))
    plain = build_dataset(shards, tokenizer)
    num_moved = num_changed = 0
    for i in reversed(range(NUM_SAMPLES)):
        first, again, later = dataset[Item(0, i, 1.0)], other[Item(0, i, 1.0)], dataset[Item(1, i, 1.0)]
        assert torch.equal(first.pixel_values, again.pixel_values)
        assert torch.equal(first.sequences.input_ids, again.sequences.input_ids)
        num_changed += not torch.equal(first.pixel_values, later.pixel_values)
        num_moved += first.sequences.input_ids.tolist() != plain[Item(0, i, 1.0)].sequences.input_ids.tolist()
    assert num_changed > NUM_SAMPLES / 2 and num_moved > NUM_SAMPLES / 4


def test_a_resumed_run_sees_the_very_same_augmented_batches(shards: Path, tokenizer: CogVLMTokenizer) -> None:
    whole = steps_of(build_dataset(shards, tokenizer, augment=ALL), NUM_SAMPLES)
    rest = steps_of(build_dataset(shards, tokenizer, augment=ALL), NUM_SAMPLES + 12, num_workers=2)
    for found, wanted in zip(rest, whole[1:], strict=True):
        for found_batch, wanted_batch in zip(found, wanted, strict=True):
            assert_equal(found_batch, wanted_batch)


def test_nothing_changes_where_all_is_off(shards: Path, tokenizer: CogVLMTokenizer) -> None:
    plain, off = build_dataset(shards, tokenizer), build_dataset(shards, tokenizer, augment=AugmentConfig(min_crop=0.2))
    for i in range(NUM_SAMPLES):
        assert torch.equal(plain[Item(0, i, 1.0)].pixel_values, off[Item(0, i, 1.0)].pixel_values)


@pytest.mark.parametrize("draft_side", [None, 112], ids=["full", "draft"])
@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_what_is_answered_is_where_it_is_seen(
    tmp_path: Path, tokenizer: CogVLMTokenizer, resize: str, draft_side: int | None
) -> None:
    """From a shard to a batch: the answer's text against the red pixels."""
    rng, size = random.Random(0), 112
    parts = []
    for number in range(6):
        image = Image.new("RGB", (560, 416), (20, 60, 90))
        x0, y0 = rng.randint(0, 380), rng.randint(0, 260)
        box = x0, y0, x0 + rng.randint(90, 170), y0 + rng.randint(90, 150)
        image.paste((250, 10, 10), box)
        record = {"targets": [{"phrase": "the thing", "boxes_xyxy": [box]}]}
        parts.append((f"s{number}", jpeg(image), json.dumps(record).encode()))
    write_shard(tmp_path, "train-0.tar", parts, ext="jpg")
    vision: dict[str, Any] = {"image_size": size, "num_positions": 65}
    config = CogVLMConfig(vocab_size=len(tokenizer), template_version="chat", vision_config=vision, image_resize=resize)
    dataset = build_dataset(
        tmp_path,
        tokenizer,
        reader=ShardReader(load_index(tmp_path, "train"), draft_side=draft_side),
        wording=Wording("w", {"en": LanguageWording(("{phrase}?",), ("{boxes}",), "no")}),
        config=config,
        augment=replace(ALL, hue=0),
    )
    for epoch in range(8):
        for i in range(len(parts)):
            example = dataset[Item(epoch, i, 1.0)]
            labels = example.sequences.labels
            [answered] = parse_boxes(tokenizer.decode(labels[labels >= 0].tolist())) or []
            assert example.bad is None
            found = [(edge + 0.5) / 1000 * size for edge in answered]
            np.testing.assert_allclose(red_box(example.pixel_values), found, atol=1.2)


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def red_box(pixels: torch.Tensor) -> Box:
    levels = (pixels * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255
    red = (levels[0] - levels[2] > 60).numpy()
    columns, rows = np.flatnonzero(red.any(axis=0)), np.flatnonzero(red.any(axis=1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def test_seed_of_the_samples_is_that_of_the_run(shards: Path, tokenizer: CogVLMTokenizer) -> None:
    first, other = (build_dataset(shards, tokenizer, augment=ALL, seed=seed) for seed in (SEED, SEED + 1))
    same = [
        torch.equal(first[Item(0, i, 1.0)].pixel_values, other[Item(0, i, 1.0)].pixel_values)
        for i in range(NUM_SAMPLES)
    ]
    assert sum(same) < NUM_SAMPLES / 2
