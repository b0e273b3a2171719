"""Reading one sample: the picture as stored, and one kind of error whatever is wrong."""

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
from PIL import Image

from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.record import BadSampleError

ROOT = Path(__file__).parents[3]
GOOD = {"targets": [{"phrase": "dog", "boxes_xyxy": [[1, 2, 8, 6]]}]}


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
    """A reader of one shard with these pictures and records; the keys are s0, s1, ..."""
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
        (picture(image_format="GIF"), GOOD, "broken_image"),
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
    os.truncate(path, int(reader.index.json_offset[1]) + 3)
    with pytest.raises(BadSampleError, match="short_read"):
        reader.read(1)
    assert reader.read(0).record.key == "s0"
    path.unlink()
    with pytest.raises(BadSampleError, match="unreadable_shard"):
        ShardReader(reader.index).read(0)


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
