"""Augmented training samples: texts and boxes stay correct, and equal samples always give equal images."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from strategies import COLOURS, SIDES, boxes_in, targets_in, texts
from test_loader import NUM_SAMPLES, SEED, assert_equal, build_dataset, steps_of
from test_reader import write_shard

from cogvlm_ft.config import load_config
from cogvlm_ft.data.augment import Colours, augments, choose_look, crop, draft_side
from cogvlm_ft.data.frames import Frame, move_record, photo_frame
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.loader import Item
from cogvlm_ft.data.look import turns_of
from cogvlm_ft.data.mentions import mentions_colour, mentions_place, mentions_side
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.record import Record
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.grounding.boxes import boxes_from_bins, parse_boxes
from cogvlm_ft.grounding.targets import Box, Target, Turn
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model import CogVLMConfig, CogVLMTokenizer
from cogvlm_ft.model.preprocess import MEAN, STD
from cogvlm_ft.settings import RESIZES, AugmentConfig, DataConfig

ALL = AugmentConfig(crop=0.7, min_crop=0.3, flip=0.5, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1)
PHOTO_PX = (320, 240)
SIDE = 112


def record_of(*boxes: Box, phrase: str = "the dog", key: str = "k", turns: tuple[Turn, ...] = ()) -> Record:
    return Record(key, PHOTO_PX, "s", (Target(phrase, "en", boxes), Target("the cat", "en", ())), turns)


def looks(record: Record, settings: AugmentConfig, turns: tuple[Turn, ...] = ()) -> list[tuple[Frame, Colours]]:
    """Choose the looks of many epochs."""
    return [choose_look(record, turns, settings, "squash", seed=0, epoch=epoch) for epoch in range(60)]


def test_nothing_is_augmented_unless_asked_for() -> None:
    config = load_config(None, ["model.path=m", "data.shards=s", "output_dir=o"])
    assert not augments(config.data.augment) and augments(ALL)
    whole = photo_frame(PHOTO_PX, "squash"), Colours()
    assert looks(record_of((1, 2, 30, 40)), config.data.augment) == [whole] * 60


@st.composite
def records(draw: st.DrawFn, *, plain: bool = False) -> Record:
    """Generate an image of any size with up to four targets; if plain, their phrases name no side and no colour."""
    size = draw(st.integers(8, 1500)), draw(st.integers(8, 1500))
    targets = draw(st.lists(targets_in(size, plain=plain), min_size=1, max_size=4))
    return Record(draw(st.text("abc", max_size=3)), size, "s", tuple(targets), ())


def boxes_of(record: Record) -> list[Box]:
    return [box for target in record.targets for box in target.boxes_xyxy]


@pytest.mark.slow
@given(records(), st.sampled_from(RESIZES), st.integers(0, 9))
def test_a_crop_keeps_every_box_of_every_target_whole(record: Record, resize: str, epoch: int) -> None:
    """Keep boxes of all targets, not only of one question."""
    frame, _ = choose_look(record, (), replace(ALL, crop=1), resize, seed=0, epoch=epoch)
    left, top, right, bottom = frame.window_px
    photo_width, photo_height = frame.photo_px
    width, height = frame.size_px
    if resize == "squash":
        assert left >= 0 and top >= 0 and right <= photo_width and bottom <= photo_height, "never beyond the photo"
    else:
        assert width == height
    for x0, y0, x1, y1 in frame.apply_boxes(boxes_of(record)):
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height


@pytest.mark.slow
@given(records(), st.sampled_from(RESIZES), st.sampled_from(["box", "steps", "detection"]), st.integers(0, 9))
def test_box_text_is_about_the_moved_boxes(record: Record, resize: str, wording: str, epoch: int) -> None:
    """Train on the moved record's boxes, within one bin (and clamped to the last pixel)."""
    frame, _ = choose_look(record, (), replace(ALL, crop=0.5), resize, seed=0, epoch=epoch)
    turns = turns_of(move_record(record, frame), load_wording(wording), seed=0, epoch=epoch)
    asked = {box for turn in turns if turn.target for box in turn.target.boxes_xyxy}
    assert asked == set(frame.apply_boxes(boxes_of(record)))
    sides = np.array(frame.size_px * 2)
    for turn in turns:
        assert turn.target
        bins = parse_boxes(turn.answer) or []
        written = boxes_from_bins(bins, frame.size_px)
        moved = np.minimum(np.array(turn.target.boxes_xyxy).reshape(-1, 4), sides - 1)
        assert len(written) == len(moved)
        for box in written:  # in the order of the wording
            assert (np.abs(moved - box) <= sides / 1000).all(axis=1).any()


def test_a_photo_without_present_targets_is_cropped_too() -> None:
    frames = [frame for frame, _ in looks(record_of(), replace(ALL, crop=1))]
    assert len({frame.window_px for frame in frames}) > 40
    assert all(frame.window_px[0] >= 0 and frame.window_px[3] <= 240 for frame in frames)


def test_crops_enlarge_small_targets() -> None:
    """Draw a frame of half the size or less as often as a larger one, never below min_crop."""
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


PLACES = ("phrase", "description", "prompt", "answer", "history")


def with_text(record: Record, place: str, text: str) -> tuple[Record, tuple[Turn, ...]]:
    """Put the text into the record or a turn about it; as the phrase it is that of the absent target."""
    turn = Turn("where?", "there")
    if place in ("phrase", "description"):
        return replace(record, targets=(*record.targets[:-1], replace(record.targets[-1], **{place: text}))), (turn,)
    return record, (replace(turn, **{place: (("q", text),) if place == "history" else text}),)


@st.composite
def mentions(draw: st.DrawFn, words: dict[str, tuple[str, ...]]) -> str:
    """Generate any text around one of the words, which in English stands alone."""
    language = draw(st.sampled_from(("zh", "en")))
    return draw(st.text(max_size=8)) + (" {} " if language == "en" else "{}").format(
        draw(texts(language, words[language]))
    )


@pytest.mark.slow
@given(mentions(SIDES), st.sampled_from(PLACES))
def test_no_mirror_and_no_crop_where_a_text_mentions_a_side(text: str, place: str) -> None:
    record, turns = with_text(record_of((100, 100, 108, 106)), place, text)
    assert {frame for frame, _ in looks(record, AugmentConfig(flip=1, crop=1), turns)} == {
        photo_frame(PHOTO_PX, "squash")
    }


@given(st.text(), st.text(), st.sampled_from(["左", "右"]), st.sampled_from(PLACES))
def test_left_and_right_are_seen_in_any_chinese_text(before: str, after: str, side: str, place: str) -> None:
    record, turns = with_text(record_of((100, 100, 108, 106)), place, before + side + after)
    frame, _ = choose_look(record, turns, AugmentConfig(flip=1), "squash", seed=0, epoch=0)
    assert not frame.mirrored


@pytest.mark.slow
@given(records(plain=True), st.sampled_from(["box", "description", "steps", "conversation"]), st.integers(0, 3))
def test_photos_that_nothing_speaks_against_are_mirrored_and_recoloured(
    record: Record, wording: str, epoch: int
) -> None:
    """Ignore the built-in words around the phrases."""
    turns = turns_of(record, load_wording(wording), seed=0, epoch=epoch)
    frame, colours = choose_look(record, turns, replace(ALL, flip=1), "squash", seed=0, epoch=epoch)
    assert frame.mirrored and colours.hue != 0


@given(mentions(COLOURS), st.sampled_from(PLACES))
def test_no_other_hue_where_a_text_mentions_a_colour(text: str, place: str) -> None:
    record, turns = with_text(record_of((100, 100, 108, 106)), place, text)
    _, colours = choose_look(record, turns, ALL, "squash", seed=0, epoch=0)
    assert colours.hue == 0 and colours.brightness != 1


@pytest.mark.parametrize("phrase", ["the cup in the corner", "中间的杯子", "the left one"])
def test_no_crop_where_a_text_mentions_a_place(phrase: str) -> None:
    record = record_of((100, 100, 108, 106), phrase=phrase)
    assert {frame.window_px for frame, _ in looks(record, AugmentConfig(crop=1))} == {(0, 0, 320, 240)}


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


FACTORS = st.floats(0, 2)


@given(st.builds(Colours, FACTORS, FACTORS, FACTORS, st.floats(-0.5, 0.5)), boxes_in((30, 20), whole=True))
def test_colours_move_nothing(colours: Colours, box: Box) -> None:
    """Keep equal pixels equal."""
    image, (x0, y0, x1, y1) = Image.new("RGB", (30, 20), (40, 90, 60)), (int(edge) for edge in box)
    image.paste((200, 60, 40), (x0, y0, x1, y1))
    inside = np.zeros((20, 30), bool)
    inside[y0:y1, x0:x1] = True
    seen = np.asarray(colours.apply(image))
    assert seen.shape == (20, 30, 3)
    for part in (seen[inside], seen[~inside]):
        assert len(part) == 0 or not np.ptp(part, axis=0).any()


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
    with pytest.raises(ConfigError, match=r"data\.resize='crop': expected one of squash, letterbox"):
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
    for found, expected in zip(rest, whole[1:], strict=True):
        for found_batch, expected_batch in zip(found, expected, strict=True):
            assert_equal(found_batch, expected_batch)


def test_nothing_changes_where_all_is_off(shards: Path, tokenizer: CogVLMTokenizer) -> None:
    plain, off = build_dataset(shards, tokenizer), build_dataset(shards, tokenizer, augment=AugmentConfig(min_crop=0.2))
    for i in range(NUM_SAMPLES):
        assert torch.equal(plain[Item(0, i, 1.0)].pixel_values, off[Item(0, i, 1.0)].pixel_values)


@pytest.mark.slow
@settings(max_examples=60)
@given(st.data())
def test_what_is_answered_is_where_it_is_seen(tokenizer: CogVLMTokenizer, data: st.DataObject) -> None:
    """Compare the answer's text with the red pixels, from a shard to a batch, within 1.2 pixels of 112."""
    resize, draft_side = data.draw(st.sampled_from(RESIZES)), data.draw(st.sampled_from([None, SIDE]))
    language, words = data.draw(st.sampled_from(("zh", "en"))), data.draw(st.sampled_from([{}, SIDES, COLOURS]))
    phrase = data.draw(texts(language, words.get(language, ())))
    size = data.draw(st.integers(20, 36)) * 16, data.draw(st.integers(20, 36)) * 16
    box = data.draw(boxes_in(size, 90, whole=True))
    image = Image.new("RGB", size, (20, 60, 90))
    image.paste((250, 10, 10), tuple(int(edge) for edge in box))
    record = {"targets": [{"phrase": phrase, "boxes_xyxy": [box]}]}
    vision: dict[str, Any] = {"image_size": SIDE, "num_positions": 65}
    config = CogVLMConfig(vocab_size=len(tokenizer), template_version="chat", vision_config=vision, image_resize=resize)
    with TemporaryDirectory() as folder:
        write_shard(Path(folder), "train-0.tar", [("s", jpeg(image), json.dumps(record).encode())], ext="jpg")
        dataset = build_dataset(
            Path(folder),
            tokenizer,
            reader=ShardReader(load_index(folder, "train"), draft_side=draft_side),
            config=config,
            augment=replace(ALL, hue=0),
        )
        example = dataset[Item(data.draw(st.integers(0, 20)), 0, 1.0)]
    labels = example.sequences.labels
    [answered] = parse_boxes(tokenizer.decode(labels[labels >= 0].tolist())) or []
    assert example.bad is None
    found = [(edge + 0.5) / 1000 * SIDE for edge in answered]
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
