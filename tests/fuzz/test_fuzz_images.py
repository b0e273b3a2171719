"""Damaged and hostile image files through build, review and reader: bad ones are reported, good ones stay."""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from annotation_samples import DATA, LABELME, real
from mutate import cpu_limit, memory_limit
from PIL import Image
from scaling import scaled

from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import MAX_PIXELS, ShardReader
from cogvlm_ft.data.record import BadSampleError
from cogvlm_ft.shards.build import BuildSettings, build
from cogvlm_ft.shards.packing.verify import VERIFY, verify_image
from cogvlm_ft.shards.review import annotated_items, review, shard_items

NUM_FOLDERS, NUM_DAMAGED = max(8, scaled(16)), scaled(24)
SECONDS = 20.0  # of computing, for a folder of images that takes well under one
LIMIT = 1800 * 1200  # pixels, those of the largest
OCR = DATA / "chinese_document_xfund/examples/optical_character_recognition/text_recognition/sources"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300, method="thread")]


@cache
def real_images() -> dict[str, bytes]:
    """Return real images by file name; some are real pixels in another kind of file."""
    palette = real(OCR / "demo_ocr.png")
    photo = real(OCR / "japan_1.jpg")
    webp = real(DATA / "xlabel_phrases/examples/classification/shape-level/sources/multi-task/elon-musk-tesla.webp")
    grey = real(DATA / "voc_raccoon/images/raccoon-150.jpg")
    with Image.open(io.BytesIO(photo)) as image:
        exif = Image.Exif()
        exif[0x0112], exif[0x010F] = 6, "a camera"
        return {
            "photo.jpg": photo,
            "palette.png": palette,
            "photo.webp": webp,
            "grey.jpg": grey,
            "progressive.jpg": _encoded(image, "JPEG", progressive=True),
            "turned.jpg": _encoded(image, "JPEG", exif=exif),
            "alpha.png": _encoded(image.convert("RGBA"), "PNG"),
            "deep.png": _encoded(image.convert("I;16"), "PNG"),
            "deep.tif": _encoded(image.convert("I;16"), "TIFF", compression="tiff_lzw"),
            "float.tif": _encoded(image.convert("F"), "TIFF"),
            "cmyk.jpeg": _encoded(image.convert("CMYK"), "JPEG"),
            "turned.webp": _encoded(image, "WEBP", exif=exif),
            "turned.png": _encoded(image, "PNG", exif=exif),
            "lzw.tif": _encoded(image, "TIFF", compression="tiff_lzw"),
            "plain.tiff": _encoded(image, "TIFF", exif=exif),
            "plain.bmp": _encoded(image, "BMP"),
        }


def _encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def damaged(rng: random.Random) -> tuple[str, bytes]:
    """Return (file name, content) of a real image after something happened to it."""
    name, data = rng.choice(sorted(real_images().items()))
    kind = rng.randrange(9)
    if kind == 0:
        return name, data[: rng.randrange(len(data))]
    if kind == 1:
        return name, data[: rng.choice((0, 1, 2, 8, 20, 33, 100, 600))]
    if kind == 2:
        return name, data[: (start := rng.randrange(len(data)))] + bytes(len(data) - start)
    if kind == 3:
        ending = rng.choice(("jpg", "JPG", "png", "webp", "bmp", "tif", "gif", "eps", "jp2", ""))
        return f"{name.partition('.')[0]}.{ending}", data
    if kind == 4:
        contents = (b"%!PS-Adobe-3.0 EPSF-3.0\n", b"GIF89a", b"<svg/>", b"%PDF-1.7\n", b"8BPS\0\1", bytes(1000))
        return name, rng.choice(contents) + rng.randbytes(100)
    if kind == 5:
        return name, data[:4] + rng.randbytes(rng.choice((4, 40, 4000)))
    if kind == 6 and data.startswith(b"\x89PNG"):
        return name, _with_changed_chunk(rng, data)
    if kind == 6 and data.startswith(b"\xff\xd8"):
        exif = b"Exif\0\0" + rng.choice((b"II*\0", b"MM\0*", b"")) + rng.randbytes(rng.choice((0, 4, 60, 3000)))
        return name, data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    changed = bytearray(data)
    end = len(data) if kind == 7 else min(len(data), 700)  # the head: sizes, tables, EXIF
    for _ in range(rng.choice((1, 2, 5, 40))):
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return name, bytes(changed)


def _with_changed_chunk(rng: random.Random, data: bytes) -> bytes:
    """Return a PNG with changed content and correct checksums."""
    chunks = list(_chunks(data))
    i = rng.randrange(len(chunks))
    kind, content = chunks[i]
    if content:
        changed = bytearray(content)
        for _ in range(rng.choice((1, 3))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        content = bytes(changed)
    chunks[i : i + 1] = rng.choice(
        ([], [(kind, content)], [(kind, content)] * 2, [(b"tEXt", content), (kind, content)])
    )
    return data[:8] + b"".join(_chunk(*chunk) for chunk in chunks)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = 8
    while position < len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        yield data[position + 4 : position + 8], data[position + 8 : position + 8 + size]
        position += 12 + size


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def write_folder(root: Path, images: dict[str, bytes]) -> Path:
    """Write the images, and JSON lines with a question for each of them."""
    (root / "images").mkdir(parents=True)
    lines = []
    for name, data in images.items():
        (root / "images" / name).write_bytes(data)
        targets = [{"phrase": "dog", "boxes": [[0, 0, 8, 8]]}, {"phrase": "cat", "boxes": []}]
        lines.append(json.dumps({"image": name, "key": name.replace(".", "_"), "targets": targets}))
    (root / "lines.jsonl").write_text("\n".join(lines))
    return root / "lines.jsonl"


@pytest.mark.parametrize("number", range(NUM_FOLDERS))
def test_damaged_images(number: int, tmp_path: Path) -> None:
    rng = random.Random(f"images {number}")
    good = real_images()
    bad = [damaged(rng) for _ in range(NUM_DAMAGED)]
    images = {**good, **{f"{i}-{name}": data for i, (name, data) in enumerate(bad)}}
    lines = write_folder(tmp_path, images)
    verify, out = VERIFY[number % 2], tmp_path / "out"
    settings = BuildSettings("jsonl", tmp_path / "images", lines, val_fraction=0.0, max_pixels=LIMIT, verify=verify)
    with cpu_limit(SECONDS):
        build(settings, out, num_workers=1)
        reader = ShardReader(load_index(out, "train"), max_pixels=LIMIT, draft_side=(None, 16)[number // 2 % 2])
        read, unread = read_all(reader)
        review(annotated_items("jsonl", lines, tmp_path / "images"), "", tmp_path / "review")
        review(shard_items(out), "", tmp_path / "review of shards")
    rows = rows_of(out / "rejected.jsonl")
    lost = {row["key"] for row in rows if row["level"] == "sample"}
    assert len(read) + len(unread) + len(lost) == len(images)
    assert {name.replace(".", "_") for name in good} <= read
    assert len(lost) >= NUM_DAMAGED // 6
    assert verify != "decode" or not unread
    broken = {row["source"] for row in rows if row["reason"] == "broken_image"}
    suspects = {row["source"] for row in rows_of(tmp_path / "review" / "suspects.jsonl") if row["level"] == "sample"}
    assert verify == "decode" or broken <= suspects
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    build(settings, out, num_workers=1, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def read_all(reader: ShardReader) -> tuple[set[str], set[str]]:
    """Return the keys of what could be read, and of what is counted as bad."""
    read, unread = set(), set()
    for i in range(len(reader)):
        try:
            sample = reader.read(i)
            assert sample.image.mode == "RGB" and sample.record.targets[0].phrase == "dog"
            read.add(sample.record.key)
        except BadSampleError as error:
            assert str(error) and error.reason
            unread.add(error.key)
    reader.close()
    return read, unread


def bombs() -> dict[str, bytes]:
    """Return small files that claim to be huge images."""
    photo = real(OCR / "japan_1.jpg")
    frame = next(i for i in range(len(photo)) if photo[i : i + 2] in (b"\xff\xc0", b"\xff\xc2"))
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(bytes(10**6)))
    tiff = bytearray(_encoded(Image.new("L", (8, 8)), "TIFF"))
    for tag in (256, 257):  # width and height
        place = tiff.index(struct.pack("<HHI", tag, 4, 1)) + 8
        tiff[place : place + 4] = struct.pack("<I", 10**6)
    bmp = bytearray(_encoded(Image.new("RGB", (8, 8)), "BMP"))
    bmp[18:26] = struct.pack("<ii", 2**31 - 1, 2**31 - 1)
    return {
        "a.png": png + _chunk(b"IEND", b""),
        "a.jpg": photo[: frame + 5] + struct.pack(">HH", 65500, 65500) + photo[frame + 9 :],
        "a.tif": bytes(tiff),
        "a.bmp": bytes(bmp),
    }


@pytest.mark.parametrize("verify", VERIFY)
def test_decompression_bombs_are_refused_before_they_are_decoded(verify: str) -> None:
    for name, data in bombs().items():
        with memory_limit(2**29), cpu_limit(5), pytest.raises(BadSampleError) as error:
            verify_image(data, name, MAX_PIXELS, verify)
        assert error.value.reason == "too_many_pixels", name


@pytest.mark.parametrize("verify", VERIFY)
def test_a_bomb_in_the_text_of_a_png_is_not_unpacked(verify: str) -> None:
    png = real(OCR / "demo_ocr.png")
    text = _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(500 * 10**6)))
    with memory_limit(2**28), cpu_limit(5), Image.open(io.BytesIO(png)) as image:
        assert verify_image(png[:33] + text * 3 + png[33:], "a", MAX_PIXELS, verify).size_px == image.size


def test_a_photo_over_the_limit_is_counted_and_others_stay(tmp_path: Path) -> None:
    big = real(LABELME / "tutorial/apc2016_obj3.jpg")
    lines = write_folder(tmp_path, {**bombs(), "big.jpg": big, "b.jpg": real(OCR / "japan_1.jpg")})
    settings = BuildSettings("jsonl", tmp_path / "images", lines, val_fraction=0.0, max_pixels=1210 * 907 - 1)
    with cpu_limit(SECONDS):
        build(settings, tmp_path / "out", num_workers=1)
    reasons = Counter(row["reason"] for row in rows_of(tmp_path / "out" / "rejected.jsonl"))
    assert reasons == {"too_many_pixels": 5}
    assert len(load_index(tmp_path / "out", "train")) == 1
