"""Locating samples: in shards of this project, in shards of other tools, and in damaged ones."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import tarfile
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cogvlm_ft.config import load_config, save_config
from cogvlm_ft.data import tars
from cogvlm_ft.data.index import ShardIndex, load_index
from cogvlm_ft.data.plan import plan_samples
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.shard import shard_of_offsets
from cogvlm_ft.data.sources import ShardSource, shard_sources
from cogvlm_ft.data.tars import MAX_MEMBER_BYTES, Loss, scan_tar
from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.shards.build import BuildSettings, build

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


def named(losses: Sequence[Loss]) -> list[tuple[str, str, str]]:
    return [(loss.shard, loss.key, loss.reason) for loss in losses]


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
    """Build shards with 5 samples in 3 tars."""
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
    names = ("keys", "exts", "shard_number", "image_offset", "image_num_bytes", "json_offset", "json_num_bytes")
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


def test_how_much_each_sample_asks_is_known_where_the_offsets_files_say_it(built: Path) -> None:
    index = load_index(built, "train")
    assert index.num_targets.tolist() == [1] * 5 and index.num_turns.tolist() == [0] * 5
    path = built / "train-000001.json"
    content = json.loads(path.read_bytes())
    for row in content["samples"]:
        del row["num_questions"]  # as older versions wrote it
    path.write_text(json.dumps(content))
    older = load_index(built, "train")
    assert same_samples(older, index) and older.data_sha256 == index.data_sha256
    assert older.num_targets.tolist() == [1, 1, -1, -1, 1] and older.num_turns.tolist() == [0, 0, -1, -1, 0]


@pytest.mark.parametrize("damage", ["other size", "no json", "outside", "negative", "missing field", "no numbers"])
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
    elif damage == "no numbers":
        content["samples"][0]["num_questions"] = [1, "2"]
    path.write_text("{" if damage == "no json" else json.dumps(content))
    with caplog.at_level(logging.WARNING):
        assert same_samples(load_index(built, "train"), before)
    assert "train-000001.json does not match" in caplog.text


def test_a_truncated_tar_of_ours_is_scanned(built: Path) -> None:
    path = built / "train-000000.tar"
    index = load_index(built, "train")
    path.write_bytes(path.read_bytes()[: int(index.image_offset[1]) + 5])
    damaged = load_index(built, "train")
    assert keys_of(damaged) == [index.key(i) for i in (0, 2, 3, 4)]
    assert named(damaged.losses) == [(path.name, index.key(1), "truncated")]


@pytest.mark.parametrize(
    ("split", "words"),
    [("test", r"found the splits \['train', 'val'\]; expected 'test'"), ("val", "'val': found no samples")],
)
def test_a_split_that_is_not_there(built: Path, split: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load_index(built, split)


def test_a_tar_that_the_index_does_not_name_is_reported(built: Path, caplog: pytest.LogCaptureFixture) -> None:
    (built / "train-000009.tar").write_bytes((built / "train-000002.tar").read_bytes())
    load_index(built, "train")
    assert "tars that are not read: 1, such as train-000009.tar: index.json does not name them" in caplog.text


def test_a_missing_shard_is_named(built: Path) -> None:
    (built / "train-000002.tar").unlink()
    with pytest.raises(DataError, match=r"missing shards: 1 of 3, such as train-000002\.tar"):
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
    assert keys_of(index) == ["train-0/0", "train-0/1", "train-1/0", "train-1/1"]
    assert index.shard_number.tolist() == [0, 0, 1, 1]


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
    entries, losses, _ = scan_tar(write_tar(tmp_path / "x.tar", members, tarfile.GNU_FORMAT))
    assert [(entry.key, entry.ext, entry.image_num_bytes) for entry in entries] == [
        ("dir.x/a", "jpg", 700),
        ("b", "png", 700),
        ("c", "webp", 700),
    ]
    assert named(losses) == [("x.tar", "d", "no_image")]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_with_long_and_chinese_names(tmp_path: Path, tar_format: int) -> None:
    long = "文" * 30 if tar_format == tarfile.USTAR_FORMAT else "文" * 90
    path = write_tar(tmp_path / "x.tar", samples(long, "b"), tar_format)
    entries, losses, _ = scan_tar(path)
    assert [entry.key for entry in entries] == [long, "b"] and not losses
    data = path.read_bytes()
    for entry in entries:
        assert data[entry.image_offset : entry.image_offset + entry.image_num_bytes] == entry.key.encode() * 600
        assert data[entry.json_offset : entry.json_offset + entry.json_num_bytes] == RECORD


def test_incomplete_samples_are_losses(tmp_path: Path) -> None:
    members = [*samples("a"), ("b.jpg", b"x"), ("c.json", RECORD), *samples("d"), ("a.jpg", b"again")]
    entries, losses, _ = scan_tar(write_tar(tmp_path / "x.tar", members, tarfile.GNU_FORMAT))
    assert [entry.key for entry in entries] == ["a", "d"] and entries[0].image_num_bytes == 600
    assert named(losses) == [
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
    entries, losses, _ = scan_tar(path)
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
    entries, losses, _ = scan_tar(path)
    assert [entry.key for entry in entries] == list(kept)
    assert [(key, reason) for _, key, reason in named(losses)] == lost


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_broken_header_after_a_long_name_costs_its_sample_only(tmp_path: Path, tar_format: int) -> None:
    long = "n" * 150
    path = write_tar(tmp_path / "x.tar", samples("a", long, "c"), tar_format)
    spoil(path, header_offset(path, f"{long}.jpg") + 2 * 512)  # header of the name, the name, header of the file
    entries, losses, _ = scan_tar(path)
    assert [entry.key for entry in entries] == ["a", "c"]
    assert named(losses) == [("x.tar", "", "damaged_header"), ("x.tar", long, "no_image")]


@pytest.mark.parametrize("cut", [0, 100, 511, 512, 900, 2000, 2600, 3100, 4000])
def test_a_tar_cut_anywhere_keeps_its_whole_samples(tmp_path: Path, cut: int) -> None:
    path = write_tar(tmp_path / "x.tar", samples("a", "b"))
    whole, _, _ = scan_tar(path)
    path.write_bytes(path.read_bytes()[:cut])
    entries, _, _ = scan_tar(path)
    assert entries == [
        e for e in whole if max(e.image_offset + e.image_num_bytes, e.json_offset + e.json_num_bytes) <= cut
    ]


def test_tars_written_one_after_another_into_one_file(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "1.tar", samples("a")).read_bytes()
    second = write_tar(tmp_path / "2.tar", samples("b")).read_bytes()
    (tmp_path / "x.tar").write_bytes(first + second)
    entries, losses, _ = scan_tar(tmp_path / "x.tar")
    assert [entry.key for entry in entries] == ["a", "b"] and not losses


def test_a_global_pax_header_is_no_damage(tmp_path: Path) -> None:
    headers = {"comment": "as git archive writes them"}
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
        for name, data in samples("a"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    entries, losses, _ = scan_tar(tmp_path / "x.tar")
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
            ends = entry.image_offset + entry.image_num_bytes, entry.json_offset + entry.json_num_bytes
            assert max(ends) <= path.stat().st_size


@pytest.mark.parametrize("name", ["train-0.tar.gz", "train-0.tgz", "train-0.tar"])
def test_compressed_tars_are_refused_clearly(tmp_path: Path, name: str) -> None:
    plain = write_tar(tmp_path / "plain", samples("a")).read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(plain))
    with pytest.raises(DataError, match=r"found .*compress.*; expected .*plain \.tar.* Decompress"):
        load_index(tmp_path, "train")


def patch_size(path: Path, name: str, size: int) -> None:
    """Write another size into the header of a member."""
    offset = header_offset(path, name)
    header = tarfile.TarInfo(name)
    header.size = size
    data = bytearray(path.read_bytes())
    data[offset : offset + 512] = header.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(data)


@pytest.mark.parametrize("size", [10**6, 8**11 - 1, 2**62])
def test_a_member_that_claims_to_be_huge_is_refused(tmp_path: Path, size: int) -> None:
    path = write_tar(tmp_path / "x.tar", samples("a", "b", "c"))
    patch_size(path, "b.jpg", size)
    entries, losses, _ = scan_tar(path)
    assert [entry.key for entry in entries] == ["a", "c"] and named(losses) == [("x.tar", "b", "truncated")]


def test_a_member_that_is_huge_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", samples("a", "b"))
    whole = path.read_bytes()
    patch_size(path, "b.jpg", MAX_MEMBER_BYTES + 1)
    with path.open("r+b") as file:  # a file with a hole takes no room
        file.truncate(len(whole) + MAX_MEMBER_BYTES + 512)
    entries, losses, _ = scan_tar(path)
    assert [entry.key for entry in entries] == ["a"] and ("x.tar", "b", "too_large") in named(losses)

    content = {"size": path.stat().st_size, "sha256": "0" * 64}
    sample = {"key": "b", "ext": "jpg", "image": [512, MAX_MEMBER_BYTES + 1], "json": [0, 1]}
    path = path.rename(tmp_path / "train-0.tar")
    path.with_suffix(".json").write_text(json.dumps({**content, "samples": [sample]}))
    assert keys_of(load_index(tmp_path, "train")) == ["a"]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_name_of_megabytes_is_not_read(tmp_path: Path, kind: bytes) -> None:
    path = write_tar(tmp_path / "x.tar", samples("a", "b"))
    start = header_offset(path, "b.jpg")
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, 3 << 20
    data = path.read_bytes()
    path.write_bytes(data[:start] + header.tobuf(tarfile.GNU_FORMAT) + data[start:])
    with path.open("r+b") as file:
        file.truncate(4 << 20)
    tracemalloc.start()
    entries, losses, _ = scan_tar(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [entry.key for entry in entries] == ["a", "b"] and peak < 2 << 20
    zeros = ("x.tar", "", "zeros")  # the end of the file, which makes room for the header
    assert named(losses) == ([zeros] if kind == tarfile.XGLTYPE else [("x.tar", "", "damaged_header"), zeros])


@pytest.mark.parametrize("is_sparse", [True, False])
def test_zeros_in_a_tar_are_skipped_and_listed_as_lost(tmp_path: Path, is_sparse: bool) -> None:
    """A copy that was cut off leaves them: at the end, or between two tars."""
    path = write_tar(tmp_path / "x.tar", samples("a"))
    whole = path.read_bytes()
    num_bytes = 1 << 40 if is_sparse else 1 << 26
    with path.open("ab") as file:
        if is_sparse:
            file.truncate(num_bytes)
            file.seek(num_bytes)
        else:
            file.write(bytes(num_bytes - len(whole)))
        file.write(write_tar(tmp_path / "y.tar", samples("b")).read_bytes())
        file.truncate(num_bytes * 2)
    begun = time.thread_time()
    entries, losses, _ = scan_tar(path)
    assert time.thread_time() - begun < 2
    assert [entry.key for entry in entries] == ["a", "b"]
    assert [loss.reason for loss in losses] == ["zeros", "zeros"]
    assert f"{num_bytes - entries[0].json_offset - 512} bytes of zeros from byte" in losses[0].detail


def test_keys_and_records_that_are_too_long_are_lost_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "MAX_RECORD_BYTES", 1000)
    members = [*samples("a", "k" * 2000), ("b.jpg", b"x"), ("b.json", b" " * 1001)]
    entries, losses, _ = scan_tar(write_tar(tmp_path / "x.tar", members, tarfile.GNU_FORMAT))
    assert [entry.key for entry in entries] == ["a"]
    assert sorted({loss.reason for loss in losses}) == ["long_key", "too_large"]
    row = {"key": "k" * 2000, "ext": "jpg", "image": [0, 1], "json": [0, 1]}
    content = {"size": 10, "sha256": "", "num_samples": 1, "samples": [row]}
    with pytest.raises(ValueError, match=r"samples\[0\]: found a key of 2000 bytes; expected at most 1024"):
        shard_of_offsets(content, tmp_path / "x.tar", 10)


def test_pipes_and_folders_in_place_of_tars_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train-0.tar")
    for named in (str(tmp_path), str(tmp_path / "train-0.tar")):
        with pytest.raises(DataError, match=r"train-0\.tar: found a pipe or a device; expected a tar"):
            load_index(named, "train")
    (tmp_path / "train-0.tar").unlink()
    (tmp_path / "train-0.tar").mkdir()
    with pytest.raises(DataError, match=r"train-0\.tar: found a folder; expected a tar"):
        load_index(tmp_path, "train")


def test_nothing_to_read_says_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a folder of WebDataset shards"):
        load_index(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="found nothing"):
        load_index(tmp_path, "train")
    write_tar(tmp_path / "00000.tar", samples("a"))
    with pytest.raises(DataError, match=r"found 00000\.tar; expected shards named train-\*\.tar"):
        load_index(tmp_path, "train")
    (tmp_path / "train-0.tar").write_bytes(b"no tar at all " * 100)
    with pytest.raises(DataError, match=r"no samples.*damaged_header"):
        load_index(tmp_path, "train")


def build_source(folder: Path, names: str, colour: int) -> Path:
    """Build shards with one sample per letter; all but the last one are in train."""
    folder.mkdir()
    lines = []
    for name in names:
        Image.new("RGB", (8, 6), (ord(name), colour, 0)).save(folder / f"{name}.png")
        lines.append({"image": f"{name}.png", "targets": [{"phrase": "dog", "boxes": [[0, 0, 4, 4]]}]})
    (folder / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    build(BuildSettings("jsonl", folder, folder / "x.jsonl", val_fraction=0.0), folder / "out", num_workers=1)
    return folder / "out"


def test_several_sources_become_one_index(tmp_path: Path) -> None:
    a, b = build_source(tmp_path / "1", "abc", 0), build_source(tmp_path / "2", "abcde", 1)
    (tmp_path / "2" / "out").rename(tmp_path / "cups")
    shards = [{"path": str(a), "weight": 2}, str(tmp_path / "cups")]
    index = load_index(shards, "train")
    assert sorted(keys_of(index)) == sorted([f"out/{k}" for k in "abc"] + [f"cups/{k}" for k in "abcde"])
    assert (index.source_sizes, index.source_weights) == ((3, 5), (2.0, 1.0))
    reader = ShardReader(index)
    for i in range(len(index)):
        sample = reader.read(i)
        folder, letter = sample.record.key.split("/")
        assert sample.image.getpixel((0, 0)) == (ord(letter), int(folder == "cups"), 0)
    plan = plan_samples(index.source_sizes, index.source_weights, global_batch_size=4, seed=0)
    drawn = [index.key(i) for i in plan.order(0)]
    assert sorted(drawn) == sorted([f"out/{k}" for k in "abc"] * 2 + [f"cups/{k}" for k in "abcde"])
    assert b.parent.is_dir()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("data.shards=a", [ShardSource("a", 1.0)]),
        ("data.shards=[a,b]", [ShardSource("a", 1.0), ShardSource("b", 1.0)]),
        ("data.shards=[{path: a, weight: 2}, {path: b, weight: 0.5}]", [ShardSource("a", 2.0), ShardSource("b", 0.5)]),
        ("data.shards=http://host:80/a", [ShardSource("http://host:80/a", 1.0)]),
    ],
)
def test_how_shards_are_written_in_a_config(tmp_path: Path, setting: str, expected: list[ShardSource]) -> None:
    config = load_config(None, ["output_dir=x", "model.path=m", setting])
    assert shard_sources(config.data.shards) == expected
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_one_source_keeps_its_keys_and_its_identity(built: Path) -> None:
    plain = load_index(built, "train")
    for shards in (str(built), [str(built)], [{"path": str(built)}], {"path": str(built), "weight": 1}):
        index = load_index(shards, "train")
        assert same_samples(index, plain) and index.data_sha256 == plain.data_sha256
    assert (plain.source_sizes, plain.source_weights) == ((5,), (1.0,))


def test_every_source_and_every_weight_is_part_of_the_identity(built: Path, tmp_path: Path) -> None:
    other = build_source(tmp_path / "other", "xy", 0)
    mixtures: list[Any] = [
        str(built),
        [{"path": str(built), "weight": 0.5}],
        [str(built), str(other)],
        [str(other), str(built)],
        [{"path": str(built), "weight": 2}, str(other)],
    ]
    assert len({load_index(shards, "train").data_sha256 for shards in mixtures}) == len(mixtures)


def test_two_sources_of_one_name_are_told_apart(built: Path, tmp_path: Path) -> None:
    other = build_source(tmp_path / "other", "ab", 0)
    keys = keys_of(load_index([str(built), str(other)], "train"))
    assert len(set(keys)) == 7 and {key.split("/")[0] for key in keys} == {"out-0", "out-1"}


def test_a_source_may_have_nothing_for_a_split_if_another_has(tmp_path: Path) -> None:
    empty = build_source(tmp_path / "1", "abc", 0)
    write_tar(tmp_path / "val-0.tar", samples("v"))
    index = load_index([str(empty), str(tmp_path)], "val")
    assert len(index) == 1 and index.source_sizes == (1,)
    with pytest.raises(DataError, match="'val': found no samples"):
        load_index([str(empty), str(empty)], "val")


@pytest.mark.parametrize(
    "shards", [[], [{"path": "x", "weight": 0}], [{"path": "x", "wieght": 2}], [{"weight": 1}], [7], None, "", [["x"]]]
)
def test_a_list_of_shards_that_is_none(shards: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.shards"):
        load_index(shards, "train")


def test_an_index_that_is_damaged_is_a_data_error(built: Path) -> None:
    for content in ({"version": 1, "splits": 3}, {"version": 1, "splits": {"train": {"shards": [{"path": "a"}]}}}):
        (built / "index.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=r"index\.json"):
            load_index(built, "train")
