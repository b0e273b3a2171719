"""Photos made smaller at build time: boxes go with them, and the cost is what is said."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogvlm_ft.data.reader import ORIENTATION_TAG, decode_image
from cogvlm_ft.data.record import BadSampleError, Record, box_defect
from cogvlm_ft.grounding.boxes import bins_from_box
from cogvlm_ft.grounding.targets import Box, Target, Turn
from cogvlm_ft.shards.packing.checks import CheckedSample
from cogvlm_ft.shards.packing.shrink import max_shift_px, shrink_sample

PHOTOS = Path(__file__).resolve().parents[4] / "shared" / "data"


def encoded(image: Image.Image, image_format: str, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    buffer = io.BytesIO()
    image.save(buffer, image_format, exif=exif)
    return buffer.getvalue()


def sample_of(
    image: bytes, size: tuple[int, int], *boxes: Box, ext: str = "jpg", upright: bool = False
) -> CheckedSample:
    turns = (Turn("where?", "[[100,200,300,400]]"),)
    targets = (Target("x", "en", boxes), Target("y", "en", ()))
    return CheckedSample(Record("k", size, "s", targets, turns, upright), ext, image)


def with_red_box(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    image = Image.new("RGB", size, (0, 80, 120))
    image.paste((250, 0, 0), box)
    return image


def red_box(image: Image.Image) -> Box:
    red = np.asarray(image.convert("RGB"), int)[..., 0] > 125
    columns, rows = np.flatnonzero(red.any(axis=0)), np.flatnonzero(red.any(axis=1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def test_a_photo_that_is_small_enough_keeps_its_bytes() -> None:
    sample = sample_of(b"anything", (640, 480), (1, 2, 3, 4), ext="png")
    assert shrink_sample(sample, 640) is sample


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("size", "expected"), [((400, 301), (150, 113)), ((301, 400), (113, 150)), ((1200, 3), (150, 1))]
)
def test_the_box_is_where_the_thing_is(image_format: str, size: tuple[int, int], expected: tuple[int, int]) -> None:
    box = size[0] // 4, 0, size[0] // 2, size[1] // 2 if size[1] > 3 else 3
    before = sample_of(encoded(with_red_box(size, box), image_format), size, box, ext="whatever")
    after = shrink_sample(before, 150)
    with Image.open(io.BytesIO(after.image)) as image:
        assert (image.format, image.size, after.ext) == ("JPEG", expected, "jpg")
        assert after.record.image_size_px == expected
        [moved] = after.record.targets[0].boxes_xyxy
        np.testing.assert_allclose(red_box(image), moved, atol=1)
    assert (after.record.turns, after.record.targets[1]) == (before.record.turns, before.record.targets[1])


@pytest.mark.parametrize("upright", [True, False])
def test_an_upright_photo_is_stored_upright(upright: bool) -> None:
    stored = with_red_box((400, 300), (40, 60, 100, 200))
    turned = stored.transpose(Image.Transpose.ROTATE_270)  # what orientation 6 asks for
    seen = turned if upright else stored
    after = shrink_sample(sample_of(encoded(stored, "JPEG", 6), seen.size, red_box(seen), upright=upright), 200)
    assert not after.record.upright
    with Image.open(io.BytesIO(after.image)) as image:
        assert image.getexif().get(ORIENTATION_TAG) is None
        assert image.size == (seen.width // 2, seen.height // 2) == after.record.image_size_px
        np.testing.assert_allclose(red_box(image), after.record.targets[0].boxes_xyxy[0], atol=1)


def test_box_text_moves_no_further_than_is_said() -> None:
    rng = random.Random(0)
    worst = 0.0
    for _ in range(60):
        size = rng.randint(300, 1200), rng.randint(300, 1200)
        max_side = rng.randint(100, 290)
        boxes = []
        for _ in range(20):
            x0, y0 = rng.uniform(0, size[0] - 2), rng.uniform(0, size[1] - 2)
            boxes.append((x0, y0, rng.uniform(x0 + 1, size[0]), rng.choice([float(size[1]), y0 + 1])))
        sample = shrink_sample(sample_of(encoded(Image.new("L", size), "PNG"), size, *boxes), max_side)
        small = sample.record.image_size_px or (0, 0)
        for before, after in zip(boxes, sample.record.targets[0].boxes_xyxy, strict=True):
            assert box_defect(after, small) is None
            shifts = np.subtract(bins_from_box(before, size), bins_from_box(after, small)) / 1000 * 490
            limits = [max_shift_px(side, 490) for side in (*small, *small)]
            assert (np.abs(shifts) <= limits).all()
            inside = np.array(after) <= np.array([*small, *small]) - 1
            assert (np.abs(shifts[inside]) <= 0.5).all(), "one bin: only the last pixel is clamped"
            worst = max(worst, float((np.abs(shifts) / limits).max()))
    assert worst > 0.4, "and it is no idle talk"


def test_what_it_costs_at_common_sizes() -> None:
    assert max_shift_px(1024, 490) == pytest.approx(0.97, abs=0.01)
    assert max_shift_px(1536, 980) == pytest.approx(1.62, abs=0.01)


def test_the_same_photo_gives_the_same_bytes() -> None:
    sample = sample_of(encoded(with_red_box((300, 200), (9, 9, 99, 99)), "PNG"), (300, 200), (9, 9, 99, 99))
    assert shrink_sample(sample, 100) == shrink_sample(sample, 100)
    assert len(shrink_sample(sample, 100, quality=30).image) < len(shrink_sample(sample, 100).image)


def test_what_cannot_be_decoded_is_a_bad_sample() -> None:
    with pytest.raises(BadSampleError, match="broken_image"):
        shrink_sample(sample_of(b"\xff\xd8\xff", (300, 200)), 100)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the real photos of ../shared/data are not there")
@pytest.mark.parametrize("name", ["DJI-00760-00001.jpg", "zh_train_0.jpg", "raccoon-194.jpg"])
def test_the_pixels_of_a_real_photo_differ_little(name: str) -> None:
    """As the documents state it: at --max-side 1024 about one level of 255 on average in the model's 490 px input."""
    data = next(PHOTOS.rglob(name)).read_bytes()
    full = decode_image(data, "k", 10**8)
    small = decode_image(shrink_sample(sample_of(data, full.size), 1024).image, "k", 10**8)
    a, b = (np.asarray(image.resize((490, 490), Image.Resampling.BICUBIC), int) for image in (full, small))
    assert np.abs(a - b).mean() < 1.6
