"""Damaged and hostile shard sets: what is not damaged is read, what is gone is reported, nothing crashes or hangs."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from annotation_samples import DATA, real
from mutate import cpu_limit, memory_limit, mutate_bytes, mutate_json
from PIL import Image
from scaling import scaled

from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.record import BadSampleError
from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.build import BuildSettings, build
from cogvlm_ft.shards.review import review, shard_items

NUM_TARS, NUM_INDEXES, NUM_CONTINUED = scaled(320), scaled(200), scaled(60)
SECONDS = 10.0  # of computing, for a set that takes milliseconds
NUM_PHOTOS, PER_SHARD = 9, 3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300, method="thread")]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> BuildSettings:
    """Parts of a real photo, each with a question."""
    root = tmp_path_factory.mktemp("photos")
    photo = real(
        DATA / "chinese_document_xfund/examples/optical_character_recognition/text_recognition/sources/japan_1.jpg"
    )
    (root / "images").mkdir()
    lines = []
    with Image.open(io.BytesIO(photo)) as image:
        for i in range(NUM_PHOTOS):
            image.crop((20 * i, 10 * i, 20 * i + 64, 10 * i + 48)).save(root / "images" / f"{i}.jpg")
            target = {"phrase": f"字 {i}", "boxes": [[i, 0, 30, 40]]}
            lines.append(json.dumps({"image": f"{i}.jpg", "targets": [target]}, ensure_ascii=False))
    (root / "lines.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return BuildSettings("jsonl", root / "images", root / "lines.jsonl", val_fraction=0.0, samples_per_shard=PER_SHARD)


@pytest.fixture(scope="module")
def built(settings: BuildSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "built"
    build(settings, out, num_workers=1)
    return out


@dataclass
class Found:
    """What came out of a shard set: content by key, keys of bad samples, number of other losses."""

    read: dict[str, str]
    bad: set[str]
    num_losses: int


def read_set(folder: Path) -> Found:
    index = load_index(folder, "train")
    reader = ShardReader(index, max_pixels=10**6)
    found = Found({}, set(), len(index.losses))
    for i in range(len(index)):
        try:
            sample = reader.read(i)
            content = repr(sample.record).encode() + sample.image.tobytes()
            found.read[index.key(i)] = hashlib.sha256(content).hexdigest()
        except BadSampleError as error:
            assert str(error) and error.reason
            found.bad.add(error.key)
    reader.close()
    return found


def test_damaged_tars(built: Path, tmp_path: Path) -> None:
    """Bits, blocks and stretches of one tar, found by its offsets file or by a scan."""
    whole = read_set(built)
    assert len(whole.read) == NUM_PHOTOS
    for number in range(NUM_TARS):
        rng = random.Random(f"tar {number}")
        folder = copy_of(built, tmp_path)
        tar = folder / f"train-00000{rng.randrange(3)}.tar"
        places = {row["key"]: _stretch(row) for row in json.loads(tar.with_suffix(".json").read_bytes())["samples"]}
        data = tar.read_bytes()
        changed, start, end = damage(rng, data)
        tar.write_bytes(changed)
        is_ours = remove_index_files(rng, folder)
        with cpu_limit(SECONDS):
            found = read_set(folder)
        shift = len(changed) - len(data)
        for key, content in whole.read.items():
            first, last = places.get(key, (-1, -1))
            is_behind = first >= end and shift >= 0 and shift % tarfile.BLOCKSIZE == 0
            if last <= start or is_behind:  # where bytes are missing, a member may reach into the next header
                assert found.read.get(key) == content, f"input {number} lost {key}"
        accounted = len(found.read.keys() & whole.read) + len(found.bad & whole.read.keys())
        silent = accounted < NUM_PHOTOS and not found.num_losses
        assert not (is_ours and silent), f"input {number} lost something without a word"


def _stretch(row: dict[str, list[int]]) -> tuple[int, int]:
    """Bytes of a sample in its tar, with the headers."""
    starts = [row["image"][0], row["json"][0]]
    ends = [sum(row["image"]), sum(row["json"])]
    return min(starts) - tarfile.BLOCKSIZE, max(ends)


def damage(rng: random.Random, data: bytes) -> tuple[bytes, int, int]:
    """(changed data, and where it was changed: from, to)"""
    start = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(len(data) // 512) * 512
    end = min(len(data), start + rng.choice((1, 4, 100, 512, 1024, 5000)))
    size, kind = end - start, rng.randrange(7)
    if kind == 0:
        return data[:start], start, len(data)
    new = (
        bytes(size),
        rng.randbytes(size),
        bytes(byte ^ (1 << rng.randrange(8)) for byte in data[start:end]),
        b"\xff" * size,
        data[start:end] * 2,
        b"",
    )[kind - 1]
    return data[:start] + new + data[end:], start, end


def copy_of(built: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(built, folder)
    return folder


def remove_index_files(rng: random.Random, folder: Path) -> bool:
    """None of them, the offsets, or all: then the set is like one of somebody else, and what is gone is not known.

    True if it is one of ours.
    """
    kind = rng.randrange(3)
    for path in folder.glob("train-*.json") if kind == 1 else folder.glob("*.json") if kind == 2 else ():
        path.unlink()
    return kind != 2


def test_damaged_index_files(built: Path, tmp_path: Path) -> None:
    whole = read_set(built)
    num_loaded = 0
    for number in range(NUM_INDEXES):
        rng = random.Random(f"index {number}")
        folder = copy_of(built, tmp_path)
        path = folder / rng.choice(("index.json", "train-000000.json", "train-000001.json", "build.json"))
        data = path.read_bytes()
        path.write_bytes(mutate_json(rng, json.loads(data)) if rng.random() < 0.6 else mutate_bytes(rng, data))
        with cpu_limit(SECONDS):
            try:
                found = read_set(folder)
                if number % 3 == 0:
                    review(shard_items(folder), "", tmp_path / "review")
            except DataError as error:
                assert path.name == "index.json" and str(folder) in str(error)
                continue
        num_loaded += 1
        accounted = len(found.read) + len(found.bad)
        assert accounted >= NUM_PHOTOS or found.num_losses, f"input {number} lost something without a word"
        assert len(found.read.keys() & whole.read) >= NUM_PHOTOS - PER_SHARD
    assert num_loaded > NUM_INDEXES / 2


def test_index_files_that_leave_something_out(built: Path, tmp_path: Path) -> None:
    whole = read_set(built)
    folder = copy_of(built, tmp_path)
    offsets = folder / "train-000000.json"
    content = json.loads(offsets.read_bytes())
    content["samples"].pop()
    offsets.write_text(json.dumps(content))
    assert read_set(folder) == whole
    index = json.loads((folder / "index.json").read_bytes())
    index["splits"]["train"]["shards"].pop()
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"index\.json: found a damaged index"):
        load_index(folder, "train")


@pytest.mark.parametrize("content", [b"[]", b"null", b"7", b'"build"', b"{"])
def test_a_build_does_not_go_on_where_build_json_is_none(
    settings: BuildSettings, built: Path, tmp_path: Path, content: bytes
) -> None:
    folder = copy_of(built, tmp_path)
    (folder / "build.json").write_bytes(content)
    with pytest.raises(DataError, match=r"build\.json.*--overwrite"):
        build(settings, folder, num_workers=1)
    build(settings, folder, num_workers=1, overwrite=True)
    assert read_set(folder) == read_set(built)


def test_builds_go_on_in_damaged_folders(settings: BuildSettings, built: Path, tmp_path: Path) -> None:
    num_built = 0
    for number in range(NUM_CONTINUED):
        rng = random.Random(f"continued {number}")
        folder = copy_of(built, tmp_path)
        path = folder / rng.choice(
            ("build.json", "train-000000.json", "index.json", "rejected.jsonl", "train-000002.tar")
        )
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
        with cpu_limit(SECONDS):
            try:
                build(settings, folder, num_workers=1)
            except DataError as error:
                assert (path.name == "build.json" and "build.json" in str(error)) or "--overwrite" in str(error)
                continue
            assert read_set(folder).read
        num_built += 1
    assert num_built > NUM_CONTINUED / 2


GOOD_JSON = b'{"targets": [{"phrase": "dog", "boxes_xyxy": [[0, 0, 4, 4]]}]}'


def header(name: str, size: int = 0, **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % tarfile.BLOCKSIZE)


def member(name: str, data: bytes, **fields: object) -> bytes:
    return header(name, len(data), **fields) + padded(data)


def photo(colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def pair(key: str) -> bytes:
    return member(f"{key}.json", GOOD_JSON) + member(f"{key}.png", photo())


def raw_size(block: bytes, size: bytes) -> bytes:
    """The header with another size field and the checksum that fits."""
    changed = block[:124] + size.ljust(12, b"\0") + b" " * 12 + block[148:]
    changed = changed[:136] + block[136:148] + b" " * 8 + changed[156:]
    return changed[:148] + b"%06o\0 " % sum(changed) + changed[156:]


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    lines = b"".join(records)
    return header("pax", len(lines), type=kind) + padded(lines)


def record(name: str, value: str) -> bytes:
    text = f" {name}={value}\n".encode()
    size = len(text) + 1
    while len(str(size)) + len(text) != size:
        size = len(str(size)) + len(text)
    return str(size).encode() + text


NEGATIVE = (-512).to_bytes(12, "big", signed=True)
LONG_NAME = member("././@LongLink", b"x" * 300 + b"\0", type=tarfile.GNUTYPE_LONGNAME)
HOSTILE: dict[str, bytes] = {
    "dots": member("../b.json", GOOD_JSON) + member("../b.png", photo()),
    "dots inside": member("b/../../b.json", GOOD_JSON) + member("b/../../b.png", photo()),
    "absolute": member("/etc/b.json", GOOD_JSON) + member("/etc/b.png", photo()),
    "symbolic link": header("b.png", type=tarfile.SYMTYPE, linkname="/etc/passwd") + member("b.json", GOOD_JSON),
    "hard link": header("b.png", type=tarfile.LNKTYPE, linkname="a.png") + member("b.json", GOOD_JSON),
    "character device": header("b.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5) + member("b.json", GOOD_JSON),
    "block device": header("b.png", type=tarfile.BLKTYPE, devmajor=8) + member("b.json", GOOD_JSON),
    "pipe": header("b.png", type=tarfile.FIFOTYPE) + member("b.json", GOOD_JSON),
    "folder": header("b.png", type=tarfile.DIRTYPE) + member("b.json", GOOD_JSON),
    "unknown kind": header("b.png", type=b"Q") + member("b.json", GOOD_JSON),
    "10**15 bytes": header("b.png", 10**15) + member("b.json", GOOD_JSON),
    "2**90 bytes": raw_size(header("b.png"), b"\x80" + (2**80).to_bytes(11, "big")),
    "negative size": raw_size(header("b.png"), NEGATIVE) + member("b.json", GOOD_JSON),
    "negative long name": raw_size(header("x", type=tarfile.GNUTYPE_LONGNAME), NEGATIVE) + member("b.json", GOOD_JSON),
    "negative pax": raw_size(header("x", type=tarfile.XHDTYPE), NEGATIVE) + member("b.json", GOOD_JSON),
    "size that is no number": raw_size(header("b.png"), b"zzz") + member("b.json", GOOD_JSON),
    "twice": pair("b") + member("b.png", photo(9)),
    "huge long name": header("././@LongLink", 2**40, type=tarfile.GNUTYPE_LONGNAME),
    "long name cut off": header("././@LongLink", 10**6, type=tarfile.GNUTYPE_LONGNAME),
    "long names of long names": LONG_NAME * 3000,
    "headers of headers": pax(record("comment", "x")) * 3000,
    "pax path": pax(record("path", "../b.png")) + member("b.png", photo()),
    "pax size": pax(record("size", str(10**15))) + member("b.png", photo()),
    "negative pax size": pax(record("size", "-512")) + member("b.png", photo()),
    "pax size that is no number": pax(record("size", "x")) + member("b.png", photo()),
    "pax link": pax(record("linkpath", "/etc/passwd")) + header("b.png", type=tarfile.SYMTYPE, linkname="x"),
    "pax charset": pax(
        record("hdrcharset", "BINARY"), record("path", "b\udcff.png".encode("latin-1", "replace").decode())
    ),
    "pax of digits": pax(b"1" * 1_000_000) + member("b.png", photo()),
    "many paxes of digits": pax(b"1" * 16_000) * 300 + member("b.png", photo()),
    "pax of long keys": pax(b"5 aa\n" * 20_000 + b"5 a=\n") + member("b.png", photo()),
    "pax without end": pax(b"30 path=b.png") + member("b.png", photo()),
    "pax length of zero": pax(b"0 a=b\n") + member("b.png", photo()),
    "global pax of digits": pax(b"7" * 900_000, kind=b"g") + member("b.png", photo()),
    "global pax path": pax(record("path", "../b.png"), kind=b"g"),
    "sparse": header("b.png", 512, type=tarfile.GNUTYPE_SPARSE) + bytes(512),
    "sparse without end": (header("b.png", 512, type=tarfile.GNUTYPE_SPARSE)[:482] + b"\1" + bytes(29)),
    "sparse map": pax(record("GNU.sparse.map", "0,10,x"), record("GNU.sparse.size", "10")) + member("b.png", photo()),
    "sparse of pax": pax(record("GNU.sparse.major", "1"), record("GNU.sparse.minor", "0"))
    + member("b.png", b"9" * 512),
    "sparse of numbers": pax(record("GNU.sparse.numbytes", "x"), record("GNU.sparse.size", "y")) + member("b.png", b""),
    "names without text": member("\x01\x02.png", photo()) + member("b\n.json", GOOD_JSON),
    "solaris": pax(record("path", "../../b.png"), kind=b"X") + member("b.png", photo()),
    "zeros": bytes(512 * 2000),
    "noise": random.Random(0).randbytes(512 * 400),
}


REACH_ON = ("long names of long names", "pax charset", "global pax path", "sparse without end")
"""They are about the next header, or about all that follow."""


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_members(name: str, tmp_path: Path) -> None:
    """The samples before and after them are read; nothing of them is."""
    middle = HOSTILE[name]
    for data in (middle + pair("c"), middle * 2 + pair("c"), padded(middle[:-200]) + pair("c"), pair("c") + middle):
        (tmp_path / "train-0.tar").write_bytes(pair("a") + data)
        with cpu_limit(SECONDS), memory_limit(2**28):
            index = load_index(tmp_path, "train")
            found = read_set(tmp_path)
        assert "c" in found.read or name in REACH_ON
        assert "a" in found.read
        assert set(found.read) <= {"a", "b", "c"} and not any(".." in key for key in found.read)
        assert "b" not in found.read or name == "twice"
        assert index.losses or name in ("folder", "zeros", "solaris", "global pax path")
