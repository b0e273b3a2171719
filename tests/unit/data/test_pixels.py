"""Images with more than 8 bits per channel: visible, the same everywhere, or refused."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import png_16, png_chunk, tiff
from numpy.typing import NDArray
from PIL import Image

from cogvlm_ft.data.pixels import CUT_FRACTION, without_texts
from cogvlm_ft.data.reader import decode_image
from cogvlm_ft.data.record import BadSampleError


def square(low: float, high: float, dtype: str, channels: int = 1) -> NDArray[np.generic]:
    """60 rows of 90: a square of `high` (in the first colour only) on `low`."""
    values = np.full((60, 90, channels), low, dtype)
    values[10:30, 20:70, 0] = high
    return values[..., 0] if channels == 1 else values


def seen(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(decode_image(data, "k", 10**6))


def assert_square(pixels: NDArray[np.uint8], inside: list[int], outside: list[int]) -> None:
    expected = np.empty((60, 90, 3), np.uint8)
    expected[...], expected[10:30, 20:70] = outside, inside
    np.testing.assert_array_equal(pixels, expected)


def saved(values: NDArray[np.generic], image_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, image_format)
    return buffer.getvalue()


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        ("uint16", 29000, 31000),  # a thermal camera
        ("uint16", 3, 4000),  # 12 bits of an X-ray
        ("int16", -1000, 3000),  # a computed tomography
        ("int32", -100_000, 100_000),
        ("uint32", 10, 4_000_000_000),
        ("float32", 0.2, 0.6),
        ("float32", -3.0, 1e30),
        ("int8", -100, 100),
    ],
)
def test_a_square_is_seen_in_every_kind_of_grey(
    dtype: str, low: float, high: float, compressed: bool, order: str
) -> None:
    data = tiff(square(low, high, dtype), order=order, compressed=compressed)
    if dtype == "uint32" and order == ">":
        with pytest.raises(BadSampleError, match="broken_image: found a damaged TIFF, or one of an unsupported kind"):
            seen(data)
    else:
        assert_square(seen(data), [255] * 3, [0] * 3)


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_16_bits_keep_their_lower_byte(channels: int) -> None:
    values = square(1000, 1200, "uint16", channels)
    values[40:, 5:9, 2] = 1104
    expected = seen(png_16(values.astype(np.uint16)))
    assert expected[20, 30].tolist() == [255, 0, 0] and expected[0, 0].tolist() == [0, 0, 0]
    assert expected[50, 6].tolist() == [0, 0, 133]
    if channels == 3:
        for order in "<>":
            for compressed in (False, True):
                np.testing.assert_array_equal(seen(tiff(values, order=order, compressed=compressed)), expected)


def test_grey_with_alpha() -> None:
    grey = square(100, 300, "uint16")
    both = np.stack([grey, np.full_like(grey, 40_000)], -1).astype(np.uint16)
    assert_square(seen(png_16(both)), [255] * 3, [0] * 3)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["uint16", "int32", "float32"]),
    st.integers(0, 60_000),
    st.integers(1, 5000),
    st.tuples(st.integers(5, 60), st.integers(5, 60)),
)
def test_values_become_grey_in_proportion(dtype: str, start: int, span: int, size: tuple[int, int]) -> None:
    values = np.random.default_rng(start).integers(start, start + span + 1, size).astype(dtype)
    values.flat[0], values.flat[-1] = start, start + span
    grey = seen(saved(values, "TIFF"))
    assert (grey == grey[..., :1]).all()
    ordered = np.sort(values.ravel().astype(float))
    cut = int(CUT_FRACTION * ordered.size)
    low, high = ordered[cut], ordered[-1 - cut]
    np.testing.assert_allclose(grey[..., 0], np.clip((values - low) / (high - low) * 255, 0, 255), atol=0.51)


def test_a_few_defective_pixels_do_not_decide() -> None:
    values = np.tile(np.linspace(29_000, 31_000, 200), (100, 1)).astype(np.uint16)
    values[3, 4], values[70, 8] = 0, 65_535
    grey = seen(saved(values, "PNG"))[..., 0]
    assert (grey[3, 4], grey[70, 8]) == (0, 255)
    assert grey[50, 40] < 60 and grey[50, 100] == pytest.approx(128, abs=4) and grey[50, 160] > 195


def test_one_bright_point_on_an_even_ground_is_seen() -> None:
    values = np.full((100, 100), 500, np.uint16)
    values[5, 6] = 600
    grey = seen(saved(values, "PNG"))[..., 0]
    assert grey[5, 6] == 255 and grey.sum() == 255


def test_values_without_meaning_do_not_count() -> None:
    values = square(0.2, 0.6, "float32").astype(np.float32)
    values[40:50] = np.nan
    values[50], values[51] = np.inf, -np.inf
    grey = seen(tiff(values))[..., 0]
    assert [grey[0, 0], grey[20, 30], grey[45, 0], grey[50, 0], grey[51, 0]] == [0, 255, 0, 255, 0]
    missing = square(0.2, 0.6, "float32").astype(np.float32)
    missing[40:] = -9999
    assert_square(seen(tiff(missing, nodata="-9999")), [255] * 3, [0] * 3)


def test_white_is_zero() -> None:
    assert_square(seen(tiff(square(1000, 3000, "uint16"), photometric=0)), [0] * 3, [255] * 3)
    assert_square(seen(tiff(square(10, 200, "uint8"), photometric=0)), [55] * 3, [245] * 3)


def test_an_image_of_one_value_is_grey() -> None:
    assert (seen(saved(np.full((9, 7), 700, np.uint16), "PNG")) == 128).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(np.full((6, 9), np.nan, np.float32)), "unsupported_pixels: no pixel has a finite value"),
        (tiff(np.zeros((6, 9, 3), np.uint8), photometric=8), "unsupported_pixels: pixels of mode LAB; expected"),
        (tiff(np.zeros((6, 9, 3), np.uint16), planes=True), "unsupported_pixels: a TIFF of 16 bits in separate planes"),
        (tiff(np.zeros((6, 9), np.float64)), "broken_image: found a damaged TIFF, or one of an unsupported kind"),
        (tiff(np.zeros((6, 9, 3), np.float32)), "broken_image: found a damaged TIFF, or one of an unsupported kind"),
        (b"\0\0\0\x1cftypheic" + bytes(99), "broken_image: found HEIC; expected one of JPEG, PNG"),
        (b"GIF89a" + bytes(99), "broken_image: found GIF; expected one of JPEG, PNG"),
        (b"<html>", "broken_image: unknown format; expected one of JPEG, PNG"),
    ],
)
def test_images_without_a_known_range_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(BadSampleError, match=reason):
        seen(data)


def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded() -> None:
    """Each scan goes through all pixels, and a file of a megabyte holds a hundred thousand."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (9, 99, 200)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    assert decode_image(data, "k", 10_000).size == (64, 64)
    last = data.rindex(b"\xff\xda")
    bomb = data[:last] + data[last:-2] * 200 + data[-2:]
    with pytest.raises(BadSampleError, match=r"unsupported_pixels: a JPEG of 20\d scans; expected at most 100\. Save"):
        decode_image(bomb, "k", 10_000)


def test_8_bit_images_are_those_of_pillow() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    by_version = [] if PIL.__version__ < "13" else ["YCbCr"]  # Pillow 12 cannot read what it writes
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", *by_version):
        image = Image.fromarray(rgb).convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
        with Image.open(buffer) as opened:
            assert opened.mode == mode
            np.testing.assert_array_equal(seen(buffer.getvalue()), np.asarray(opened.convert("RGB")))


TEXTS = {
    "tEXt": (b"tEXt", b"Comment\0" + b"x" * 3_000_000),
    "zTXt": (b"zTXt", b"prompt\0\0" + zlib.compress(b"x" * 3_000_000)),
    "iTXt": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"x" * 3_000_000)),
    "iCCP": (b"iCCP", b"profile\0\0" + zlib.compress(b"x" * 3_000_000)),
}


@pytest.mark.parametrize("kind", sorted(TEXTS))
def test_a_png_with_a_large_text_is_a_whole_image(kind: str) -> None:
    values = square(0, 65_535, "uint16", 3).astype(np.uint16)
    exif = struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, 0x0112, 3, 1, 6, 0, 0)
    data = png_16(values, (b"eXIf", exif), *[TEXTS[kind]] * 30)
    assert_square(seen(data), [255, 0, 0], [0, 0, 0])
    assert decode_image(data, "k", 10**6, upright=True).size == (60, 90), "EXIF data is kept"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(sorted(TEXTS)), max_size=3), st.integers(0, 200), st.booleans())
def test_only_texts_are_removed(kinds: list[str], cut: int, before: bool) -> None:
    short = [(TEXTS[kind][0], TEXTS[kind][1][:30]) for kind in kinds]
    plain = png_16(square(0, 65_535, "uint16").astype(np.uint16))
    data = png_16(square(0, 65_535, "uint16").astype(np.uint16), *short)
    assert without_texts(data) == plain
    after = plain[:-12] + b"".join(png_chunk(*chunk) for chunk in short) + plain[-12:]
    assert without_texts(after) == plain
    end = len(data) - cut % len(data)
    assert plain.startswith(without_texts(data[:end])) or end < len(data)
    assert without_texts(b"\xff\xd8" + data) == b"\xff\xd8" + data
