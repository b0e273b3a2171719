"""Finding samples: in our own shards, in those of others, and in damaged ones."""

from __future__ import annotations

import gzip
import io
import json
import logging
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cogvlm_ft.data.index import ShardIndex, load_index
from cogvlm_ft.data.tars import scan_tar
from cogvlm_ft.errors import DataError
from shards.build import BuildSettings, build

RECORD = b'{"turns": [{"prompt": "p", "answer": "q"}]}'


def write_tar(path: Path, members: list[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(*keys: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.{ext}", data) for key in keys for ext, data in (("jpg", key.encode() * 600), ("json", RECORD))]


def keys_of(index: ShardIndex) -> list[str]:
    return [index.key(i) for i in range(len(index))]


def header_offset(path: Path, name: str) -> int:
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset


def spoil(path: Path, offset: int, size: int = 512) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + size] = b"\xa5" * size
    path.write_bytes(data)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """Our own shards: 5 samples in 3 tars."""
    photos = tmp_path / "photos"
    photos.mkdir()
    lines = []
    for name in "abcde":
        Image.new("RGB", (8, 6), (ord(name), 0, 0)).save(photos / f"{name}.png")
        lines.append({"image": f"{name}.png", "targets": [{"phrase": "dog", "boxes": [[0, 0, 4, 4]]}]})
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = BuildSettings("jsonl", photos, tmp_path / "x.jsonl", val_fraction=0.0, samples_per_shard=2)
    build(settings, tmp_path / "out", num_workers=1)
    return tmp_path / "out"


def same_samples(a: ShardIndex, b: ShardIndex) -> bool:
    names = ("keys", "exts", "shard_number", "image_offset", "image_size", "json_offset", "json_size")
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)


def test_a_scan_finds_what_the_offsets_files_say(built: Path) -> None:
    by_offsets = load_index(built, "train")
    for path in built.glob("*.json"):
        path.unlink()
    by_scan = load_index(built, "train")
    assert len(by_scan) == 5 and same_samples(by_offsets, by_scan) and not by_scan.losses
    assert by_scan.exts.tolist() == [b"png"] * 5
    assert by_scan.image_offset.dtype == np.int64


def test_the_data_has_an_identity(built: Path) -> None:
    first = load_index(built, "train").data_sha256
    assert load_index(built, "train").data_sha256 == first
    content = json.loads((built / "train-000001.json").read_bytes())
    content["sha256"] = "0" * 64
    (built / "train-000001.json").write_text(json.dumps(content))
    assert load_index(built, "train").data_sha256 != first


@pytest.mark.parametrize("damage", ["other size", "no json", "outside", "negative", "missing field"])
def test_an_offsets_file_that_does_not_fit_is_not_used(
    built: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    before = load_index(built, "train")
    path = built / "train-000001.json"
    content: dict[str, Any] = json.loads(path.read_bytes())
    if damage == "other size":
        content["size"] += 512
    elif damage == "outside":
        content["samples"][1]["json"][1] = 10**12
    elif damage == "negative":
        content["samples"][1]["image"][0] = -1
    elif damage == "missing field":
        del content["samples"][0]["key"]
    path.write_text("{" if damage == "no json" else json.dumps(content))
    with caplog.at_level(logging.WARNING):
        assert same_samples(load_index(built, "train"), before)
    assert "train-000001.json does not fit" in caplog.text


def test_a_truncated_tar_of_ours_is_scanned(built: Path) -> None:
    path = built / "train-000000.tar"
    index = load_index(built, "train")
    path.write_bytes(path.read_bytes()[: int(index.image_offset[1]) + 5])
    damaged = load_index(built, "train")
    assert keys_of(damaged) == [index.key(i) for i in (0, 2, 3, 4)]
    assert damaged.losses == ((path.name, index.key(1), "truncated"),)


@pytest.mark.parametrize(
    ("split", "words"), [("test", r"no split 'test', found \['train', 'val'\]"), ("val", "'val' has no samples")]
)
def test_a_split_that_is_not_there(built: Path, split: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load_index(built, split)


def test_a_missing_shard_is_named(built: Path) -> None:
    (built / "train-000002.tar").unlink()
    with pytest.raises(DataError, match=r"not there, such as train-000002\.tar"):
        load_index(built, "train")


def test_an_unfinished_build_is_refused(built: Path) -> None:
    (built / "index.json").unlink()
    with pytest.raises(DataError, match="unfinished build"):
        load_index(built, "train")


def test_shards_of_others_are_scanned(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"wids_version": 1, "shardlist": []}')
    write_tar(tmp_path / "train-1.tar", samples("0", "1"))
    write_tar(tmp_path / "train-0.tar", samples("0", "1"))
    write_tar(tmp_path / "val-0.tar", samples("v"))
    index = load_index(tmp_path, "train")
    assert [path.name for path in index.shard_paths] == ["train-0.tar", "train-1.tar"]
    assert keys_of(index) == ["0", "1", "0", "1"] and index.shard_number.tolist() == [0, 0, 1, 1]


def test_keys_end_at_the_first_dot_of_the_last_part(tmp_path: Path) -> None:
    image, record = b"i" * 700, RECORD
    members = [
        ("./dir.x/a.JPG", image),
        ("./dir.x/a.json", record),
        ("d.e.jpg", image),  # extension "e.jpg": no image for WebDataset
        ("d.json", record),
        ("b.json", record),
        ("b.seg.png", image),
        ("b.png", image),
        ("c.txt", b"x"),
        (".hidden.jpg", image),
        ("README", b"x"),
        ("c.webp", image),
        ("c.json", record),
    ]
    entries, losses = scan_tar(write_tar(tmp_path / "x.tar", members))
    assert [(entry.key, entry.ext, entry.image_size) for entry in entries] == [
        ("dir.x/a", "jpg", 700),
        ("b", "png", 700),
        ("c", "webp", 700),
    ]
    assert losses == [("x.tar", "d", "no_image")]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_with_long_and_chinese_names(tmp_path: Path, tar_format: int) -> None:
    long = "文" * 30 if tar_format == tarfile.USTAR_FORMAT else "文" * 90
    path = write_tar(tmp_path / "x.tar", samples(long, "b"), tar_format)
    entries, losses = scan_tar(path)
    assert [entry.key for entry in entries] == [long, "b"] and not losses
    data = path.read_bytes()
    for entry in entries:
        assert data[entry.image_offset : entry.image_offset + entry.image_size] == entry.key.encode() * 600
        assert data[entry.json_offset : entry.json_offset + entry.json_size] == RECORD


def test_incomplete_samples_are_losses(tmp_path: Path) -> None:
    members = [*samples("a"), ("b.jpg", b"x"), ("c.json", RECORD), *samples("d"), ("a.jpg", b"again")]
    entries, losses = scan_tar(write_tar(tmp_path / "x.tar", members))
    assert [entry.key for entry in entries] == ["a", "d"] and entries[0].image_size == 600
    assert losses == [
        ("x.tar", "a", "duplicate_member"),
        ("x.tar", "b", "no_json"),
        ("x.tar", "c", "no_image"),
    ]


def test_unsafe_members_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in [("e.jpg", tarfile.SYMTYPE), ("f.json", tarfile.LNKTYPE), ("g.jpg", tarfile.CHRTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in [("../h.jpg", b"x"), ("/i.jpg", b"x"), ("j/../../k.json", b"x"), *samples("a")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    entries, losses = scan_tar(path)
    assert [entry.key for entry in entries] == ["a"]
    assert [loss.reason for loss in losses] == ["not_a_regular_file"] * 3 + ["unsafe_name"] * 3


@pytest.mark.parametrize(
    ("member", "kept", "lost"),
    [
        ("a.jpg", "bcd", [("", "damaged_header"), ("a", "no_image")]),
        ("b.jpg", "acd", [("", "damaged_header"), ("b", "no_image")]),
        ("c.json", "abd", [("", "damaged_header"), ("c", "no_json")]),
        ("d.json", "abc", [("", "damaged_header"), ("d", "no_json")]),
    ],
)
def test_a_broken_header_costs_its_sample_only(tmp_path: Path, member: str, kept: str, lost: Any) -> None:
    path = write_tar(tmp_path / "x.tar", samples(*"abcd"))
    spoil(path, header_offset(path, member))
    entries, losses = scan_tar(path)
    assert [entry.key for entry in entries] == list(kept)
    assert [(key, reason) for _, key, reason in losses] == lost


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_broken_header_after_a_long_name_costs_its_sample_only(tmp_path: Path, tar_format: int) -> None:
    long = "n" * 150
    path = write_tar(tmp_path / "x.tar", samples("a", long, "c"), tar_format)
    spoil(path, header_offset(path, f"{long}.jpg") + 2 * 512)  # header of the name, the name, header of the file
    entries, losses = scan_tar(path)
    assert [entry.key for entry in entries] == ["a", "c"]
    assert losses == [("x.tar", "", "damaged_header"), ("x.tar", long, "no_image")]


@pytest.mark.parametrize("cut", [0, 100, 511, 512, 900, 2000, 2600, 3100, 4000])
def test_a_tar_cut_anywhere_keeps_its_whole_samples(tmp_path: Path, cut: int) -> None:
    path = write_tar(tmp_path / "x.tar", samples("a", "b"))
    whole, _ = scan_tar(path)
    path.write_bytes(path.read_bytes()[:cut])
    entries, _ = scan_tar(path)
    assert entries == [e for e in whole if max(e.image_offset + e.image_size, e.json_offset + e.json_size) <= cut]


def test_tars_written_one_after_another_into_one_file(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "1.tar", samples("a")).read_bytes()
    second = write_tar(tmp_path / "2.tar", samples("b")).read_bytes()
    (tmp_path / "x.tar").write_bytes(first + second)
    entries, losses = scan_tar(tmp_path / "x.tar")
    assert [entry.key for entry in entries] == ["a", "b"] and not losses


def test_a_global_pax_header_is_no_damage(tmp_path: Path) -> None:
    headers = {"comment": "as git archive writes them"}
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
        for name, data in samples("a"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    entries, losses = scan_tar(tmp_path / "x.tar")
    assert [entry.key for entry in entries] == ["a"] and not losses


def test_random_damage_never_stops_a_scan_and_never_invents_a_sample(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for tar_format in [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT] * 40:
        path = write_tar(tmp_path / "x.tar", samples("a", "n" * 120, "文" * 60, "d"), tar_format)
        data = np.frombuffer(path.read_bytes(), dtype=np.uint8).copy()
        places = rng.integers(0, len(data), rng.integers(1, 200))
        data[places] = rng.integers(0, 256, len(places))
        path.write_bytes(data[: rng.integers(1, len(data))].tobytes())
        for entry in scan_tar(path)[0]:
            ends = entry.image_offset + entry.image_size, entry.json_offset + entry.json_size
            assert max(ends) <= path.stat().st_size


@pytest.mark.parametrize("name", ["train-0.tar.gz", "train-0.tgz", "train-0.tar"])
def test_compressed_tars_are_refused_clearly(tmp_path: Path, name: str) -> None:
    plain = write_tar(tmp_path / "plain", samples("a")).read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(plain))
    with pytest.raises(DataError, match=r"compressed.*unpack"):
        load_index(tmp_path, "train")


def test_nothing_to_read_says_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        load_index(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="found nothing"):
        load_index(tmp_path, "train")
    write_tar(tmp_path / "00000.tar", samples("a"))
    with pytest.raises(DataError, match=r"no shards called train-\*.tar; found 00000.tar"):
        load_index(tmp_path, "train")
    (tmp_path / "train-0.tar").write_bytes(b"no tar at all " * 100)
    with pytest.raises(DataError, match=r"no samples.*damaged_header"):
        load_index(tmp_path, "train")
