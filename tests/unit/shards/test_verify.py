"""What the look at the structure of an image finds, and what only decoding finds."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from photo_builds import image_bytes
from PIL import Image

from cogvlm_ft.data.reader import decode_image
from cogvlm_ft.data.record import BadSampleError
from cogvlm_ft.shards.packing.verify import VERIFY, verify_image

DATA = Path(__file__).parents[3].parent / "shared" / "data"
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "TIFF"]


def is_good(data: bytes, verify: str, max_pixels: int = 10_000) -> bool:
    try:
        return bool(verify_image(data, "k", max_pixels, verify))
    except BadSampleError as error:
        assert error.reason == "broken_image"
        return False


@pytest.mark.parametrize("verify", VERIFY)
@pytest.mark.parametrize("image_format", FORMATS)
def test_a_good_image_has_its_size(image_format: str, verify: str) -> None:
    assert verify_image(image_bytes(40, 30, image_format=image_format), "k", 1200, verify).size_px == (40, 30)


@pytest.mark.parametrize("verify", VERIFY)
@pytest.mark.parametrize("image_format", FORMATS)
def test_too_many_pixels(image_format: str, verify: str) -> None:
    with pytest.raises(BadSampleError, match="too_many_pixels: 40 x 30 pixels; expected at most 1199"):
        verify_image(image_bytes(40, 30, image_format=image_format), "k", 1199, verify)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True, "restart_marker_blocks": 1}])
def test_a_jpeg_cut_anywhere_is_found(options: dict[str, int]) -> None:
    """With a thumbnail inside, which has an end of its own."""
    exif = Image.Exif()
    exif[0x010E] = "\xff\xd9 text"
    buffer = io.BytesIO()
    picture = Image.open(io.BytesIO(image_bytes(48, 32)))
    picture.save(buffer, "JPEG", exif=exif.tobytes() + image_bytes(8, 8), **options)
    whole = buffer.getvalue()
    assert is_good(whole, "structure") and is_good(whole + b"trailing bytes of a camera", "structure")
    for end in range(len(whole) - 1):
        assert not is_good(whole[:end], "structure"), end
    for start in range(3, len(whole) - 1, 7):
        assert not is_good(whole[:start] + bytes(len(whole) - start), "structure"), start


def test_a_png_with_any_bit_changed_is_found() -> None:
    whole = image_bytes(12, 9, image_format="PNG")
    for place in range(len(whole) - 12):  # the last chunk is empty
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        assert not is_good(bytes(damaged), "structure"), place
        assert not is_good(whole[:place], "structure"), place


@pytest.mark.parametrize("image_format", ["WEBP", "BMP", "TIFF"])
def test_other_kinds_are_decoded(image_format: str) -> None:
    whole = image_bytes(40, 30, image_format=image_format)
    for end in (0, 1, 10, len(whole) // 2, len(whole) * 9 // 10):
        assert not is_good(whole[:end], "structure")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"\xff\xd8\xff",
        b"\xff\xd8\xff" * 999,
        b"\xff\xd8" + b"\xff" * 999,
        b"<html>",
        b"\x89PNG\r\n\x1a\n",
    ],
)
def test_rubbish(data: bytes) -> None:
    assert not is_good(data, "structure") and not is_good(data, "decode")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks about the damage
@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_random_damage_gives_a_size_or_an_error(image_format: str) -> None:
    rng = np.random.default_rng(0)
    original = image_bytes(40, 30, image_format=image_format)
    num_bad = 0
    for _ in range(300):
        data = np.frombuffer(original, dtype=np.uint8).copy()
        places = rng.integers(0, rng.choice([60, len(data)]), rng.integers(1, 20))
        data[places] = rng.integers(0, 256, len(places))
        num_bad += not is_good(data[: rng.integers(1, 2 * len(data))].tobytes(), "structure", max_pixels=10**9)
    assert num_bad > 100


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data sets are not in {DATA}")
def test_every_real_photo_is_whole_either_way() -> None:
    paths = sorted(path for path in DATA.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))[::9]
    assert len(paths) > 30
    for path in paths:
        data = path.read_bytes()
        assert verify_image(data, "k", 10**8).size_px == decode_image(data, "k", 10**8).size
