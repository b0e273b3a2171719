"""Frames: the picture and its boxes move together, and back. Checked on pixels, over random pictures and boxes."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_reader import write_shard

from cogvlm_ft.data.augment import crop
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.record import BadSampleError, Record
from cogvlm_ft.data.transforms import GRID_PX, Frame, fit, move_record, photo_frame, resize_of
from cogvlm_ft.evaluate.evaluate import _predict, _read_questions
from cogvlm_ft.grounding.boxes import bins_from_box, boxes_from_bins
from cogvlm_ft.grounding.metrics import match_iou
from cogvlm_ft.grounding.targets import Box, Target, Turn
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model import CogVLMConfig, load_config, preprocess_image

SIDE = 98
NUM_CASES = 150
RED = (255, 20, 20)


def noise(width: int, height: int, seed: int) -> Image.Image:
    """Nothing red in it."""
    pixels = np.random.default_rng(seed).integers(0, 90, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def random_frame(rng: random.Random, photo_px: tuple[int, int], box: Box) -> Frame:
    """Any frame that holds the box whole."""
    frame = photo_frame(photo_px, "squash")
    if rng.random() < 0.7:
        frame = crop(frame, [box], rng.uniform(0.3, 1), rng)
    frame = Frame(photo_px, frame.window_px, mirrored=rng.random() < 0.5)
    return fit(frame, rng.choice(["squash", "letterbox"]))


def cases() -> Iterator[tuple[Image.Image, Box, Frame]]:
    """A photo with a red box in it, and a frame."""
    rng = random.Random(0)
    for number in range(NUM_CASES):
        width, height = rng.randint(60, 400), rng.randint(60, 400)
        x0, y0 = rng.randint(0, width - 40), rng.randint(0, height - 40)
        x1, y1 = rng.randint(x0 + 30, width), rng.randint(y0 + 30, height)
        image = noise(width, height, number)
        image.paste(RED, (x0, y0, x1, y1))
        box = float(x0), float(y0), float(x1), float(y1)
        yield image, box, random_frame(rng, image.size, box)


def red_box(image: Image.Image) -> Box:
    """Where it is red."""
    red = np.asarray(image)[..., 0] > 150
    columns, rows = np.flatnonzero(red.any(axis=0)), np.flatnonzero(red.any(axis=1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def in_square(box: Box, size_px: tuple[int, int]) -> list[float]:
    """From pixels of the frame to pixels of the model's input."""
    width, height = size_px
    return [edge / length * SIDE for edge, length in zip(box, (width, height, width, height), strict=True)]


def test_a_red_box_is_where_the_moved_box_says() -> None:
    seen: set[tuple[bool, bool, bool]] = set()
    for image, box, frame in cases():
        [moved] = frame.apply_boxes([box])
        seen_image = frame.apply_image(image, SIDE)
        assert seen_image.size == (SIDE, SIDE)
        np.testing.assert_allclose(red_box(seen_image), in_square(moved, frame.size_px), atol=1)
        corner = frame.window_px[:2]
        seen.add((frame.mirrored, max(corner) > 0, min(corner) < 0))
    assert len(seen) >= 7, "squash and letterbox, mirrored or not, a part or the whole"


def test_there_and_back_is_the_same_box() -> None:
    rng = random.Random(1)
    for _, box, frame in cases():
        assert frame.invert_boxes(frame.apply_boxes([box])) == (box,)
        fraction = tuple(edge + rng.random() for edge in box)
        np.testing.assert_allclose(frame.invert_boxes(frame.apply_boxes([fraction])), [fraction], rtol=0, atol=1e-10)  # type: ignore[list-item]


def test_a_box_is_as_large_in_the_frame_as_in_the_photo() -> None:
    """So an IoU measured there is that of the photo."""
    rng = random.Random(2)
    for _, box, frame in cases():
        other = box[0] + rng.uniform(-9, 9), box[1] + rng.uniform(-9, 9), box[2], box[3]
        there = match_iou(frame.apply_boxes([other]), frame.apply_boxes([box]))
        assert there == pytest.approx(match_iou([other], [box]), abs=1e-12)


def test_an_answer_in_bins_comes_back_to_the_photo() -> None:
    for _, box, frame in cases():
        [moved] = frame.apply_boxes([box])
        [answered] = boxes_from_bins([bins_from_box(moved, frame.size_px)], frame.size_px).tolist()
        [back] = frame.invert_boxes([answered])
        bin_px = max(frame.size_px) / 1000
        np.testing.assert_allclose(back, box, atol=max(1.0, bin_px))  # the last pixel is clamped, as the reference does


@pytest.mark.parametrize("size", [(640, 480), (98, 98), (333, 1000), (8, 1500)])
def test_squash_gives_the_reference_s_pixels_and_box_text(size: tuple[int, int]) -> None:
    image, frame = noise(*size, seed=0), photo_frame(size, "squash")
    assert frame.is_whole_photo
    assert torch.equal(preprocess_image(frame.apply_image(image, SIDE), SIDE), preprocess_image(image, SIDE))
    box = (0.3, 1.7, float(size[0]), size[1] / 3)
    assert frame.apply_boxes([box]) == (box,) and frame.size_px == size


@pytest.mark.parametrize(("size", "window"), [((640, 480), (0, -80, 640, 560)), ((48, 100), (-24, 0, 76, 100))])
def test_letterbox_keeps_the_shape_and_pads_with_grey(size: tuple[int, int], window: tuple[int, int, int, int]) -> None:
    frame = photo_frame(size, "letterbox")
    assert frame.window_px == window and frame.size_px == (max(size), max(size))
    pixels = preprocess_image(frame.apply_image(Image.new("RGB", size, RED), SIDE), SIDE)
    padded = pixels[:, :2] if size[0] > size[1] else pixels[:, :, :2]
    assert padded.abs().max() < 0.01, "nothing, for the model"
    inside = pixels[0] > 1
    shape = inside.any(dim=0).sum() / inside.any(dim=1).sum()
    assert float(shape) == pytest.approx(size[0] / size[1], rel=0.05)


def test_a_square_photo_is_the_same_either_way() -> None:
    assert photo_frame((500, 500), "letterbox") == photo_frame((500, 500), "squash")


@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_a_draft_is_framed_as_the_whole_photo_is(shrink: int) -> None:
    """On pixels of the draft, never between two of them."""
    rng = random.Random(3)
    for number in range(20):
        width, height = rng.randint(150, 300), rng.randint(150, 300)
        x0, y0 = rng.randint(0, width - 60), rng.randint(0, height - 60)
        draft = noise(width, height, number)
        draft.paste(RED, (x0, y0, x0 + 50, y0 + 40))
        photo_px = width * shrink, height * shrink
        box = x0 * shrink, y0 * shrink, (x0 + 50) * shrink, (y0 + 40) * shrink
        frame = random_frame(rng, photo_px, box)
        assert all(edge % shrink == 0 for edge in frame.window_px)
        [moved] = frame.apply_boxes([box])
        np.testing.assert_allclose(red_box(frame.apply_image(draft, SIDE)), in_square(moved, frame.size_px), atol=1)


def test_frames_lie_on_the_grid_or_on_an_edge() -> None:
    for image, _, frame in cases():
        x0, y0, x1, y1 = (edge if edge not in (*image.size, *frame.size_px) else 0 for edge in frame.window_px)
        assert x0 % GRID_PX == y0 % GRID_PX == 0
        if frame.size_px[0] != frame.size_px[1]:
            assert x1 % GRID_PX == y1 % GRID_PX == 0


def test_how_a_model_was_trained_stays_with_its_weights(tmp_path: Path) -> None:
    config = CogVLMConfig()
    assert resize_of(config) == "squash"
    config.image_resize = "letterbox"
    config.save_pretrained(tmp_path)
    assert resize_of(load_config(tmp_path)) == resize_of(load_config(tmp_path, 224)) == "letterbox"


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_evaluation_reports_and_scores_in_pixels_of_the_photo(tmp_path: Path, resize: str) -> None:
    boxes = [[100, 20, 300.5, 90], [5, 60, 50, 200]]
    record = {"targets": [{"phrase": "dog", "boxes_xyxy": boxes}, {"phrase": "cat", "boxes_xyxy": []}]}
    image = io.BytesIO()
    noise(400, 210, 0).save(image, "PNG")
    write_shard(tmp_path, "val-0.tar", [("k", image.getvalue(), json.dumps(record).encode())])
    reader, wording = ShardReader(load_index(tmp_path, "val")), load_wording("box")
    [question] = _read_questions(reader, [0], wording, 0, resize)
    assert question.frame.size_px == {"squash": (400, 210), "letterbox": (400, 400)}[resize]
    for number, turn in enumerate(question.turns):
        prediction = _predict(question, number, turn.answer, wording)
        assert prediction.image_size_px == (400, 210) and prediction.score
        if turn.target and turn.target.phrase == "cat":
            assert prediction.truth_boxes_xyxy == [] and prediction.score.said_not_found
        else:
            assert prediction.truth_boxes_xyxy == [tuple(box) for box in boxes]
            np.testing.assert_allclose(prediction.boxes_xyxy or [], boxes, atol=0.4)
            assert prediction.score.iou > 0.98


def test_a_record_moves_with_its_frame() -> None:
    targets = (Target("dog", "en", ((1.0, 2.0, 30.0, 40.0),), "a dog"), Target("猫", "zh", ()))
    record = Record("k", (100, 60), "s", targets, (Turn("how many?", "one"),))
    assert move_record(record, photo_frame((100, 60), "squash")) is record
    moved = move_record(record, photo_frame((100, 60), "letterbox"))
    assert moved.image_size_px == (100, 100) and moved.turns == record.turns
    assert moved.targets == (Target("dog", "en", ((1.0, 18.0, 30.0, 56.0),), "a dog"), targets[1])


@pytest.mark.parametrize(
    "turn",
    [
        Turn("where?", "there [[001,002,003,004]]"),
        Turn("what is [[001,002,003,004]]?", "a dog"),
        Turn("and?", "no", history=(("where?", "[[001,002,003,004]]"),)),
    ],
)
def test_boxes_in_the_user_s_own_text_cannot_be_moved(turn: Turn) -> None:
    record = Record("k", (100, 60), "s", (), (turn,))
    assert move_record(record, photo_frame((100, 60), "squash")) is record
    with pytest.raises(BadSampleError, match=r"boxes_in_turns.*data\.resize=squash"):
        move_record(record, photo_frame((100, 60), "letterbox"))
