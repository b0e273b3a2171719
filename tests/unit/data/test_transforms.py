"""Frames map an image and its boxes, and boxes back. Properties over random images, boxes and frames."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import boxes_in
from test_reader import write_shard

from cogvlm_ft.data.augment import crop
from cogvlm_ft.data.frames import GRID_PX, Frame, fit, move_record, photo_frame
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.record import BadSampleError, Record
from cogvlm_ft.data.transforms import resize_of
from cogvlm_ft.evaluate.generate import Answer
from cogvlm_ft.evaluate.questions import read_questions
from cogvlm_ft.evaluate.scoring import score_turn
from cogvlm_ft.grounding.boxes import bins_from_box, boxes_from_bins
from cogvlm_ft.grounding.metrics import match_iou
from cogvlm_ft.grounding.protocols import OURS
from cogvlm_ft.grounding.targets import Box, Target, Turn
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model import CogVLMConfig, load_config, preprocess_image
from cogvlm_ft.settings import RESIZES

SIDE = 98
RED = (255, 0, 0)


def noise(width: int, height: int, seed: int) -> Image.Image:
    """Draw noise without red."""
    pixels = np.random.default_rng(seed).integers(0, 90, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class Photo(NamedTuple):
    """draft_px: decoded at 1/shrink of its size. least_px: a box of this size has 3 pixels or more in the input."""

    draft_px: tuple[int, int]
    shrink: int
    least_px: int

    @property
    def size_px(self) -> tuple[int, int]:
        return self.draft_px[0] * self.shrink, self.draft_px[1] * self.shrink


@st.composite
def photos(draw: st.DrawFn) -> Photo:
    """Generate images of any size and of any shape up to 10:1."""
    width = draw(st.integers(8, 300))
    height = draw(st.integers(max(8, -(-width // 10)), min(300, width * 10)))
    return Photo((width, height), draw(st.sampled_from((1, 2, 4, 8))), -(-max(width, height) // 30))


@st.composite
def frames(draw: st.DrawFn, photo_px: tuple[int, int], box: Box) -> Frame:
    """Generate a frame that contains the whole box: a part or the whole, mirrored or not, squash or letterbox."""
    frame = photo_frame(photo_px, "squash")
    if draw(st.booleans()):
        frame = crop(frame, [box], draw(st.floats(0.05, 1)), draw(st.randoms()))
    return fit(replace(frame, mirrored=draw(st.booleans())), draw(st.sampled_from(RESIZES)))


class Case(NamedTuple):
    """box: pixels of the image. on_draft: the same in pixels of the draft."""

    photo: Photo
    box: Box
    on_draft: tuple[int, ...]
    frame: Frame


@st.composite
def cases(draw: st.DrawFn) -> Case:
    photo = draw(photos())
    on_draft = tuple(int(edge) for edge in draw(boxes_in(photo.draft_px, photo.least_px, whole=True)))
    x0, y0, x1, y1 = (float(edge * photo.shrink) for edge in on_draft)
    box = x0, y0, x1, y1
    return Case(photo, box, on_draft, draw(frames(photo.size_px, box)))


def red_box(image: Image.Image) -> Box:
    """Locate the red pixels; the grey beside a letterboxed image is not red."""
    levels = np.asarray(image, int)
    red = levels[..., 0] - levels[..., 2] > 130
    columns, rows = np.flatnonzero(red.any(axis=0)), np.flatnonzero(red.any(axis=1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def in_square(box: Box, size_px: tuple[int, int]) -> list[float]:
    """Map pixels of the frame to pixels of the model's input."""
    width, height = size_px
    return [edge / length * SIDE for edge, length in zip(box, (width, height, width, height), strict=True)]


@given(cases())
def test_a_red_box_is_where_the_moved_box_says(case: Case) -> None:
    """Agree within one pixel of the model's input, or a tenth of a pixel of the draft if that is more."""
    draft = Image.new("RGB", case.photo.draft_px)
    draft.paste(RED, case.on_draft)
    [moved] = case.frame.apply_boxes([case.box])
    seen = case.frame.apply_image(draft, SIDE)
    assert seen.size == (SIDE, SIDE)
    enlarged = SIDE * case.photo.shrink / min(case.frame.size_px)
    np.testing.assert_allclose(red_box(seen), in_square(moved, case.frame.size_px), atol=max(1, enlarged / 10))


@given(cases(), st.data())
def test_there_and_back_is_the_same_box(case: Case, data: st.DataObject) -> None:
    frame = case.frame
    assert frame.invert_boxes(frame.apply_boxes([case.box])) == (case.box,)
    box = data.draw(boxes_in(case.photo.size_px))
    np.testing.assert_allclose(frame.invert_boxes(frame.apply_boxes([box])), [box], rtol=0, atol=1e-9)


@given(cases(), st.data())
def test_a_box_is_as_large_in_the_frame_as_in_the_photo(case: Case, data: st.DataObject) -> None:
    """Keep the size, so that an IoU in the frame is that in the image."""
    other = data.draw(boxes_in(case.photo.size_px, 1))
    there = match_iou(case.frame.apply_boxes([other]), case.frame.apply_boxes([case.box]))
    assert there == pytest.approx(match_iou([other], [case.box]), abs=1e-9)


@given(cases())
def test_an_answer_in_bins_comes_back_to_the_photo(case: Case) -> None:
    """Agree within half a bin, except at the frame's last pixel, where the reference clamps edges."""
    frame = case.frame
    [moved] = frame.apply_boxes([case.box])
    [answered] = boxes_from_bins([bins_from_box(moved, frame.size_px)], frame.size_px).tolist()
    sides = np.array(frame.size_px * 2)
    clamped = np.minimum(moved, sides - 1)
    [expected], [back] = frame.invert_boxes([tuple(clamped)]), frame.invert_boxes([answered])
    assert (np.abs(np.subtract(back, expected)) <= sides / 2000 + 1e-6).all()
    assert np.abs(np.subtract(expected, case.box)).max() <= 1


@given(cases())
def test_frames_lie_on_the_grid_or_on_an_edge(case: Case) -> None:
    """Align frames, so that no pixel of a draft is divided."""
    frame, size = case.frame, case.photo.size_px
    x0, y0, x1, y1 = (edge if edge not in (*size, *frame.size_px) else 0 for edge in frame.window_px)
    assert x0 % GRID_PX == y0 % GRID_PX == 0
    if frame.size_px[0] != frame.size_px[1]:
        assert x1 % GRID_PX == y1 % GRID_PX == 0
    assert all(edge % case.photo.shrink == 0 for edge in frame.window_px)


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
    [question] = read_questions(reader, [0], wording, 0, resize)
    assert question.frame.size_px == {"squash": (400, 210), "letterbox": (400, 400)}[resize]
    for number, turn in enumerate(question.turns):
        answer = Answer(turn.answer, (), (), (), None)
        prediction = score_turn(question, number, answer, wording, OURS)
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
