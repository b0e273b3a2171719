"""Reading one sample: the image as stored, and one kind of error for every defect."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import (
    ORIENTATION_TAG,
    ShardReader,
    _decode,
    decode_image,
    read_orientation,
    upright_size,
)
from cogvlm_ft.data.record import BadSampleError
from cogvlm_ft.errors import DataError

ROOT = Path(__file__).parents[3]
PHOTOS = ROOT.parent / "shared" / "data"
GOOD: dict[str, Any] = {"targets": [{"phrase": "dog", "boxes_xyxy": [[1, 2, 8, 6]]}]}


def picture(width: int = 8, height: int = 6, mode: str = "RGB", image_format: str = "PNG", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, image_format, **options)
    return buffer.getvalue()


def write_shard(folder: Path, name: str, parts: list[tuple[str, bytes, bytes]], ext: str = "png") -> Path:
    with tarfile.open(folder / name, "w") as tar:
        for key, image, record in parts:
            for extension, data in ((ext, image), ("json", record)):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder / name


def reader_of(folder: Path, *parts: tuple[bytes, Any], **options: Any) -> ShardReader:
    """Build a reader of one shard with these images and records; the keys are s0, s1, ..."""
    records = [record if isinstance(record, bytes) else json.dumps(record).encode() for _, record in parts]
    write_shard(folder, "train-0.tar", [(f"s{i}", part[0], records[i]) for i, part in enumerate(parts)])
    return ShardReader(load_index(folder, "train"), **options)


def test_a_sample_comes_back_in_full(tmp_path: Path) -> None:
    image = picture()
    sample = reader_of(tmp_path, (image, GOOD)).read(0)
    assert sample.image.mode == "RGB" and sample.record.image_size_px == (8, 6) == sample.image.size
    assert np.array_equal(np.asarray(sample.image), np.asarray(Image.open(io.BytesIO(image))))
    assert sample.record.targets[0].boxes_xyxy == ((1.0, 2.0, 8.0, 6.0),)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_kind_of_picture_becomes_rgb(tmp_path: Path, mode: str) -> None:
    image = picture(mode=mode, image_format="TIFF" if mode == "CMYK" else "PNG")
    assert reader_of(tmp_path, (image, GOOD)).read(0).image.mode == "RGB"


def test_an_exif_rotation_is_not_applied_because_boxes_are_in_stored_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert reader_of(tmp_path, (picture(image_format="JPEG", exif=exif), GOOD)).read(0).image.size == (8, 6)


def oriented(orientation: int, upright: Image.Image) -> Image.Image:
    """Turn the image as a camera held that way would store it."""
    flip = Image.Transpose
    undo = {
        2: flip.FLIP_LEFT_RIGHT,
        3: flip.ROTATE_180,
        4: flip.FLIP_TOP_BOTTOM,
        5: flip.TRANSPOSE,
        6: flip.ROTATE_90,
        7: flip.TRANSVERSE,
        8: flip.ROTATE_270,
    }
    return upright if orientation == 1 else upright.transpose(undo[orientation])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_photo_is_turned_upright_with_its_boxes_if_the_record_says_so(
    tmp_path: Path, image_format: str, orientation: int
) -> None:
    upright = Image.new("RGB", (32, 24), (0, 60, 0))
    upright.paste((250, 0, 0), (8, 16, 24, 24))
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    buffer = io.BytesIO()
    options: dict[str, Any] = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}, "JPEG": {"subsampling": 0}}[
        image_format
    ]
    oriented(orientation, upright).save(buffer, image_format, exif=exif, **options)
    record = {"upright": True, "image_size_px": [32, 24], "targets": [{"phrase": "x", "boxes_xyxy": [[8, 16, 24, 24]]}]}
    sample = reader_of(tmp_path, (buffer.getvalue(), record)).read(0)
    assert sample.image.size == sample.record.image_size_px == (32, 24)
    assert np.abs(np.asarray(sample.image, int) - np.asarray(upright, int)).max() <= 8
    expected = 1 if image_format == "TIFF" else orientation  # Pillow turns it whether the record says so or not
    assert read_orientation(buffer.getvalue()) == expected
    if image_format != "TIFF":
        with Image.open(buffer) as stored:
            assert upright_size(stored.size, orientation) == (32, 24)
            turned = ImageOps.exif_transpose(stored).convert("RGB")
        assert np.array_equal(np.asarray(sample.image), np.asarray(turned))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks about the damage
@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12"]
)
def test_unreadable_exif_data_turn_nothing(tmp_path: Path, exif: bytes) -> None:
    image = picture(image_format="JPEG", exif=exif)
    assert read_orientation(image) == 1 == read_orientation(b"no image")
    assert reader_of(tmp_path, (image, GOOD | {"upright": True})).read(0).image.size == (8, 6)


@pytest.mark.parametrize(
    ("size", "draft_side", "expected"),
    [
        ((160, 96), 12, 8),
        ((160, 96), 13, 4),
        ((160, 96), 24, 4),
        ((160, 96), 48, 2),
        ((160, 96), 49, 1),
        ((162, 98), 12, 2),
        ((161, 96), 12, 1),
        ((160, 96), None, 1),
    ],
)
def test_large_jpegs_are_drafted_to_whole_pixels_not_below_the_side(
    tmp_path: Path, size: tuple[int, int], draft_side: int | None, expected: int
) -> None:
    width, height = size
    image = picture(width, height, image_format="JPEG")
    sample = reader_of(tmp_path, (image, GOOD), draft_side=draft_side).read(0)
    assert sample.image.size == (width // expected, height // expected)
    assert sample.record.image_size_px == size and sample.record.targets[0].boxes_xyxy == ((1.0, 2.0, 8.0, 6.0),)


def test_a_draft_is_turned_upright_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    image = picture(160, 96, image_format="JPEG", exif=exif)
    sample = reader_of(tmp_path, (image, GOOD | {"upright": True}), draft_side=24).read(0)
    assert sample.image.size == (24, 40) and sample.record.image_size_px == (96, 160)


def test_other_formats_are_never_drafted(tmp_path: Path) -> None:
    for image_format in ("PNG", "WEBP", "BMP", "TIFF"):
        reader = reader_of(tmp_path, (picture(64, 64, image_format=image_format), GOOD), draft_side=8)
        assert reader.read(0).image.size == (64, 64)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the real photos of ../shared/data are not there")
def test_a_draft_of_a_real_photo_differs_little() -> None:
    """Differ by less than 1.5 of 255 levels on average in the model's 490 px input, as documented."""
    names = ["DJI-00760-00001.jpg", "DJI_0005-0019.jpg", "zh_train_0.jpg"]
    for path in [path for name in names for path in PHOTOS.rglob(name)]:
        data = path.read_bytes()
        full, draft = decode_image(data, "k", 10**8), _decode(data, "k", 10**8, False, 490)[0]
        assert draft.width in (full.width // 2, full.width // 4)
        small = [np.asarray(image.resize((490, 490), Image.Resampling.BICUBIC), int) for image in (full, draft)]
        assert np.abs(small[0] - small[1]).mean() < 1.5


def test_a_box_that_leaves_by_a_rounding_error_is_clipped(tmp_path: Path) -> None:
    record = {"targets": [{"phrase": "dog", "boxes_xyxy": [[-0.5, 0, 9, 6.4]]}]}
    sample = reader_of(tmp_path, (picture(), record)).read(0)
    assert sample.record.targets[0].boxes_xyxy == ((0.0, 0.0, 8.0, 6.0),)


@pytest.mark.parametrize(
    ("image", "record", "reason"),
    [
        (b"", GOOD, "broken_image"),
        (b"<html>", GOOD, "broken_image"),
        (picture()[:-40], GOOD, "broken_image"),
        (picture(100, 90, image_format="JPEG")[:-2000], GOOD, "broken_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", GOOD, "broken_image"),
        (picture(), {"targets": [{"phrase": "dog", "boxes": [[0.1, 0.2, 0.5, 1]]}]}, "box_in_fractions"),
        (picture(101, 100), GOOD, "too_many_pixels"),
        (picture(), b"{", "bad_json"),
        (picture(), b"\xff", "bad_json"),
        (picture(), {}, "no_targets"),
        (picture(), {"targets": [], "turns": []}, "no_targets"),
        (picture(), {"targets": [{"phrase": "dog"}]}, "bad_record"),
        (picture(), {**GOOD, "image_size_px": [6, 8]}, "size_mismatch"),
        (picture(), {"targets": [{"phrase": "dog", "boxes_xyxy": [[0, 0, 10, 6]]}]}, "box_outside_image"),
        (picture(), {"targets": [{"phrase": "dog", "boxes_xyxy": [[5, 0, 4, 6]]}]}, "inverted_box"),
        (picture(), {"targets": [{"phrase": "dog", "boxes_xyxy": [[5, 0, 5, 6]]}]}, "zero_area"),
    ],
)
def test_a_bad_sample_names_its_key_and_reason(tmp_path: Path, image: bytes, record: Any, reason: str) -> None:
    reader = reader_of(tmp_path, (picture(), GOOD), (image, record), (picture(), GOOD), max_pixels=10_000)
    with pytest.raises(BadSampleError) as caught:
        reader.read(1)
    assert (caught.value.key, caught.value.reason) == ("s1", reason)
    assert reader.read(0).record.key == "s0" and reader.read(2).record.key == "s2"


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks about the damage
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_random_damage_gives_a_picture_or_a_bad_sample_error(tmp_path: Path, image_format: str) -> None:
    rng = np.random.default_rng(0)
    original = picture(40, 30, image_format=image_format)
    damaged = []
    for _ in range(60):
        data = np.frombuffer(original, dtype=np.uint8).copy()
        places = rng.integers(0, rng.choice([60, len(data)]), rng.integers(1, 20))
        data[places] = rng.integers(0, 256, len(places))
        damaged.append((data[: rng.integers(1, 2 * len(data))].tobytes(), GOOD))
    reader = reader_of(tmp_path, *damaged, max_pixels=1_000_000)
    num_bad = 0
    for i in range(len(reader)):
        try:
            assert reader.read(i).image.mode == "RGB"
        except BadSampleError:
            num_bad += 1
    assert num_bad > 5


def test_a_shard_that_shrinks_or_vanishes_after_indexing(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, (picture(), GOOD), (picture(), GOOD))
    path = tmp_path / "train-0.tar"
    assert reader.read(0).record.key == "s0"
    os.truncate(path, int(reader.index.json_offset[1]) + 3)
    with pytest.raises(BadSampleError, match="short_read"):
        reader.read(1)
    assert reader.read(0).record.key == "s0"
    path.unlink()
    with pytest.raises(BadSampleError, match="unreadable_shard"):
        ShardReader(reader.index).read(0)


def test_a_local_tar_that_is_replaced_after_indexing_is_reported(tmp_path: Path) -> None:
    index = reader_of(tmp_path, (picture(), GOOD), (picture(), GOOD)).index
    path, other = tmp_path / "train-0.tar", tmp_path / "other.tar"
    os.utime(path)
    assert ShardReader(index).read(0).record.key == "s0", "touch alone changes no content"
    other.write_bytes(path.read_bytes())
    other.rename(path)
    reader = ShardReader(index)
    for _ in range(2):
        with pytest.raises(DataError, match=r"train-0\.tar: found another file .* than when it was indexed"):
            reader.read(0)
    assert ShardReader(load_index(tmp_path, "train")).read(0).record.key == "s0"


def test_the_number_of_open_files_is_bounded(tmp_path: Path) -> None:
    record = json.dumps(GOOD).encode()
    for i in range(80):
        write_shard(tmp_path, f"train-{i:02d}.tar", [(f"k{i}", picture(), record)])
    reader = ShardReader(load_index(tmp_path, "train"))
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert [reader.read(i).record.key for i in range(80)] == [f"k{i}" for i in range(80)]
    assert len(list(Path("/proc/self/fd").iterdir())) - before == 64
    assert reader.read(0).record.key == "k0"


def test_forked_processes_read_at_the_same_time(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, *[(picture(), {"turns": [{"prompt": "p", "answer": f"{i}"}]}) for i in range(50)])
    reader.read(0)  # the file is open before the fork
    children = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            wrong = 1
            try:
                wrong = any(reader.read(i).record.turns[0].answer != f"{i}" for i in range(50))
            finally:
                os._exit(int(wrong))
        children.append(pid)
    assert all(reader.read(i).record.turns[0].answer == f"{i}" for i in range(50))
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]


def test_a_pickled_reader_opens_its_own_files(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, (picture(), GOOD))
    reader.read(0)
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).read(0).record.key, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(reader), capture_output=True, cwd=ROOT)
    assert done.stdout.decode().split() == ["s0", "False"], done.stderr.decode()
