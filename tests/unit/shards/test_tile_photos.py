"""Large photos in stored tiles: cut in a build, shown in training and evaluation as if the photo itself were stored."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from photo_builds import run_build
from PIL import Image

from cogvlm_ft.data.cutting import TileCut
from cogvlm_ft.data.frames import Frame
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.plan import WHOLE
from cogvlm_ft.data.reader import Sample, ShardReader
from cogvlm_ft.data.record import BadSampleError
from cogvlm_ft.data.stored_photo import StoredPhoto
from cogvlm_ft.data.tiling import photo_tiles, plan_tiles, show_tile
from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.evaluate.looks import LookPlace, LookReader
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.predict import large_photos
from cogvlm_ft.predict.large_photos import load_photo
from cogvlm_ft.tile_settings import TilesConfig

TILES = TilesConfig(side_px=100, overlap=0.25, fully_annotated=True)
CUT = TileCut(100, 0.25, whole_side_px=160)
SIZE_PX = 310, 230
FEW_PIXELS = 60_000  # the photos have more: they are streamed
BOXES = {"cat": [[10, 20, 50, 60]], "dog": [[200, 150, 260, 220], [90, 90, 110, 120]], "sun": []}


def photo() -> Image.Image:
    """Smooth in large parts, so that a JPEG of it is nearly exact."""
    small = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(SIZE_PX, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PNG, a baseline JPEG, a tiled TIFF, and a JPEG that EXIF turns; the boxes are those of the upright photo."""
    folder = tmp_path_factory.mktemp("large")
    turn = Image.Exif()
    turn[274] = 6
    photo().save(folder / "png.png")
    photo().save(folder / "jpeg.jpg", quality=98, subsampling=0)
    photo().save(folder / "tiff.tif", compression="tiff_adobe_deflate", tile=(64, 64))
    photo().transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", quality=98, subsampling=0, exif=turn)
    targets = [{"phrase": phrase, "boxes": boxes} for phrase, boxes in BOXES.items()]
    names = ("png.png", "jpeg.jpg", "tiff.tif", "turned.jpg")
    lines = [json.dumps({"image": name, "targets": targets}) for name in names]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module", params=[10**8, FEW_PIXELS], ids=["decoded", "streamed"])
def readers(
    request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[ShardReader]:
    """The photos as they are, and in tiles."""
    out = tmp_path_factory.mktemp("shards")
    settings = {"split": "random", "exif": "apply"}
    run_build("jsonl", images / "lines.jsonl", images, out / "whole", **settings)
    tiled = run_build(
        "jsonl", images / "lines.jsonl", images, out / "tiles", tiles=CUT, max_pixels=request.param, **settings
    )
    assert not tiled["rejected"]
    record = tiled["records"]["turned"]
    assert record["image_size_px"] == list(SIZE_PX) and record["tiles"]["photo"] == "turned.jpg"
    assert "upright" not in record and record["tiles"]["whole_px"] == [160, 119]
    return [ShardReader(load_index(out / name, "train")) for name in ("whole", "tiles")]


def by_key(reader: ShardReader) -> dict[str, Sample]:
    return {reader.index.key(i): reader.read(i) for i in range(len(reader))}


def test_stored_tiles_show_what_the_photo_shows(readers: list[ShardReader]) -> None:
    whole, tiled = map(by_key, readers)
    assert whole.keys() == tiled.keys()
    for key, sample in tiled.items():
        stored = sample.image
        assert isinstance(stored, StoredPhoto) and stored.size == SIZE_PX
        assert sample.record.targets == whole[key].record.targets
        for window in (*photo_tiles(SIZE_PX, TILES), (120, 40, 160, 80)):
            frame = Frame(SIZE_PX, window)
            seen = (np.asarray(frame.apply_image(each, 64)).astype(int) for each in (stored, whole[key].image))
            difference = np.abs(next(seen) - next(seen)).max()
            assert difference <= (0 if key in ("png", "tiff") else 6), (key, window)
        frame = Frame(SIZE_PX, (0, 0, *SIZE_PX))
        small, large = (np.asarray(frame.apply_image(each, 32)).astype(int) for each in (stored, whole[key].image))
        assert np.abs(small - large).mean() < 3, key


def test_the_same_is_asked_about_stored_tiles(readers: list[ShardReader]) -> None:
    plans = [plan_tiles(reader, load_wording("box"), TILES, None, seed=3) for reader in readers]
    assert len(plans[0]) == len(plans[1]) > len(readers[0])
    assert [plans[0].find(i) for i in range(len(plans[0]))] == [plans[1].find(i) for i in range(len(plans[1]))]
    records = [reader.read(0).record for reader in readers]
    for tile in (WHOLE, *range(len(photo_tiles(SIZE_PX, TILES)))):
        (one, frame), (other, same) = (show_tile(record, tile, TILES, seed=3, epoch=1) for record in records)
        assert (one.targets, frame) == (other.targets, same)
    with pytest.raises(ConfigError, match=r"data.tiles.side_px.*found 64, 0.25; expected 100, 0.25.*--tiles 64"):
        plan_tiles(readers[1], load_wording("box"), TilesConfig(side_px=64, overlap=0.25), None, seed=3)


def test_a_photo_with_a_damaged_tile_is_not_usable_in_an_evaluation(readers: list[ShardReader], tmp_path: Path) -> None:
    """It is counted, and none of the other photos is lost."""
    index = readers[1].index
    folder = shutil.copytree(index.shard_paths[0].parent, tmp_path / "shards")
    stored = readers[1].read(1).image
    assert isinstance(stored, StoredPhoto)
    start = int(index.image_offset[1]) + stored.tiles.place(2)[0]
    with (folder / "train-000000.tar").open("r+b") as tar:
        tar.seek(start)
        tar.write(bytes(100))
    reader = ShardReader(load_index(folder, "train"))
    looks = LookReader(reader, load_wording("box"), 0, "squash", TILES)
    num_looks = 1 + len(photo_tiles(SIZE_PX, TILES))
    shown = list(looks.read([LookPlace(photo, number) for photo in range(4) for number in range(num_looks)]))
    counts = [sum(look.question.index == photo for look in shown) for photo in range(4)]
    assert looks.bad == {1} and counts.pop(1) < num_looks and counts == [num_looks] * 3


def test_a_tile_that_is_too_large_to_decode_is_not_read(readers: list[ShardReader]) -> None:
    with pytest.raises(BadSampleError, match=r"too_many_pixels: a tile of \d+ pixels; expected at most 9000"):
        ShardReader(readers[1].index, max_pixels=9000).read(0)


def test_a_member_that_is_not_what_its_record_says(readers: list[ShardReader]) -> None:
    stored = readers[1].read(0).image
    assert isinstance(stored, StoredPhoto)
    x0, y0, x1, y1 = stored.tiles.windows_xyxy[0]
    wrong = StoredPhoto(stored.size, stored.tiles, stored.parts)
    object.__setattr__(stored.tiles, "windows_xyxy", ((x0, y0, x1 - 1, y1), *stored.tiles.windows_xyxy[1:]))
    with pytest.raises(BadSampleError, match="broken_image: tile 0: found"):
        wrong.show((x0, y0, x0 + 5, y0 + 5))


def png_of(width: int, height: int) -> bytes:
    """A PNG of one colour, without decoding or encoding it as a whole."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", bytes(100)) + chunk(b"IEND", b"")


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    progressive, cut, grey = io.BytesIO(), io.BytesIO(), io.BytesIO()
    photo().save(progressive, "JPEG", progressive=True)
    photo().save(cut, "JPEG")
    Image.fromarray(np.zeros((230, 310), np.uint16)).save(grey, "PNG")
    files = {
        "bomb.png": (png_of(40_000, 40_000), "too_many_pixels", "1600000000 pixels and|40000 x 40000 pixels in"),
        "progressive.jpg": (progressive.getvalue(), "too_many_pixels", "Save it as a baseline JPEG"),
        "cut.jpg": (cut.getvalue()[: len(cut.getvalue()) // 2], "broken_image", "cut.jpg"),
        "deep.png": (grey.getvalue() + bytes(500), "too_many_pixels", "8-bit"),
    }
    lines = []
    for name, (data, _, _) in files.items():
        (tmp_path / name).write_bytes(data)
        lines.append(json.dumps({"image": name, "targets": [{"phrase": "cat", "boxes": [[10, 20, 50, 60]]}]}))
    photo().save(tmp_path / "good.png")
    lines.append(lines[0].replace("bomb.png", "good.png"))
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    found = run_build("jsonl", tmp_path / "lines.jsonl", tmp_path, tmp_path / "out", tiles=CUT, max_pixels=FEW_PIXELS)
    assert found["records"].keys() == {"good"}
    rows = {row["image"]: row for row in found["rejected"]}
    for name, (_, reason, text) in files.items():
        assert rows[name]["reason"] == reason, rows[name]
        assert any(part in rows[name]["detail"] for part in text.split("|")), rows[name]


def test_settings_of_tiles() -> None:
    for values, name in (
        ((8, 0.2), "--tiles: 8"),
        ((100, 0.95), "--overlap: 0.95"),
        ((100, 0.2, 0), "--tile-quality: 0"),
        ((10_001, 0.2), "--tiles: 10001; expected 16 to 10000"),
        ((100, 0.2, None, 20_000), "--max-side: 20000; expected at most 10000"),
    ):
        with pytest.raises(DataError, match=name):
            TileCut(*values)  # type: ignore[arg-type]


def test_prediction_cuts_a_large_photo_once(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_photos, "MAX_PIXELS", FEW_PIXELS)
    found = load_photo(images / "turned.jpg", upright=True, tiles=TILES)
    assert isinstance(found, StoredPhoto) and found.size == SIZE_PX
    tile, window = found.show((200, 100, 300, 200))
    assert np.abs(np.asarray(tile).astype(int) - np.asarray(photo().crop(window))).max() <= 8
    with pytest.raises(BadSampleError, match="Ask with --tiles"):
        load_photo(images / "turned.jpg", upright=True, tiles=TilesConfig())
