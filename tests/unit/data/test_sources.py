"""What data.shards and data.val_shards may name: folders, tars, patterns, addresses, commands."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import logging
import lzma
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from servers import Server, serve

from cogvlm_ft.config import load_config, save_config
from cogvlm_ft.data.addresses import beside, is_tar, joined, local_path, name_of, shown
from cogvlm_ft.data.index import ShardIndex, load_index
from cogvlm_ft.data.reader import ShardReader, open_split
from cogvlm_ft.data.shard_sets import SplitChoice
from cogvlm_ft.data.sources import ShardSource, locations, shard_sources, tars_of_split
from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.tracking.provenance import without_passwords

MANDATORY = ["output_dir=x", "model.path=m"]


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("s3:/bucket/a.tar", "found an address without //; expected s3://"),
        ("HTTPS:host/a.tar", "found an address without //; expected https://"),
        ("http:///a.tar", "found no name of a host"),
        ("http://127.0.0.1:99999/a.tar", "found no name of a host with a port"),
        ("https://[::1/a.tar", "found no name of a host"),
        ("s3://", "found no name of a bucket"),
        ("s3://KEY:SECRET@bucket/*.tar", "found a user or password"),
        ("s3://KEY:SEC/RET@bucket/a.tar", "found no name of a bucket"),
        ("oss://bucket/*.tar", "found scheme 'oss'"),
    ],
)
def test_an_address_that_cannot_be_one_is_refused_without_its_password(address: str, named: str) -> None:
    with pytest.raises(DataError, match=named) as error:
        locations(address)
    assert "RET" not in str(error.value) and "\n" not in str(error.value)


def test_schemes_are_read_in_capitals_too(tmp_path: Path) -> None:
    assert locations("HTTPS://Host/A.tar") == ["https://Host/A.tar"]
    assert locations(f"FILE://{tmp_path}") == [str(tmp_path)]


def test_an_interrupted_copy_of_shards_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (0, 2, 3):
        (tmp_path / f"train-{number:06d}.tar").write_bytes(tar_bytes(str(number)) if number < 3 else b"")
    index = load_index(str(tmp_path), "train")
    assert len(index) == 2 and [loss.reason for loss in index.losses] == ["empty_file"]
    assert "those of the tars: 1, such as train-000001.tar" in caplog.text


def tar_bytes(*keys: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for key in keys:
            image = io.BytesIO()
            Image.new("RGB", (30, 20), (sum(key.encode()) % 256, 0, 0)).save(image, "PNG")
            record = {"targets": [{"phrase": key, "boxes": [[1, 2, 21, 12]]}]}
            for ext, data in (("png", image.getvalue()), ("json", json.dumps(record).encode())):
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Four tars of another program, with two samples each."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number:05d}.tar").write_bytes(tar_bytes(f"{number}a", f"{number}b"))
    return folder


def phrases(index: ShardIndex) -> list[str]:
    reader = ShardReader(index)
    return [reader.read(i).record.targets[0].phrase for i in range(len(index))]


ALL = [f"{number}{letter}" for number in range(4) for letter in "ab"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{}/00002.tar", ALL[4:6]),
        ("{}/{{00000..00003}}.tar", ALL),
        ("{}/{{00003,00001}}.tar", ALL[6:8] + ALL[2:4]),
        ("{}/*.tar", ALL),
        ("{}/0000[12].tar", ALL[2:6]),
        ("{}/00000.tar::{}/00003.tar", ALL[:2] + ALL[6:]),
        ("file:{}/00001.tar", ALL[2:4]),
        ("file://{}/{{00000..00001}}.tar", ALL[:4]),
        (["{}/00000.tar", "{}/00001.tar"], ALL[:4]),
    ],
)
def test_tars_as_users_of_webdataset_write_them(tars: Path, written: Any, expected: list[str]) -> None:
    named = [each.format(tars, tars) for each in written] if isinstance(written, list) else written.format(tars, tars)
    index = load_index(named, "train")
    assert phrases(index) == expected and [index.key(i) for i in range(len(index))] == expected


def test_a_list_of_tars_is_one_source_unless_it_has_weights(tars: Path) -> None:
    first, second = str(tars / "00000.tar"), str(tars / "00001.tar")
    assert shard_sources([first, second]) == [ShardSource(f"{first}::{second}")]
    index = load_index([{"path": first, "weight": 2}, second], "train")
    assert index.source_sizes == (2, 2) and index.key(0) == "00000.tar/0a"


def test_names_with_braces_and_brackets_that_exist_are_names(tmp_path: Path) -> None:
    for name in ("a[1].tar", "b{1,2}.tar"):
        (tmp_path / name).write_bytes(tar_bytes("x"))
        assert locations(str(tmp_path / name)) == [str(tmp_path / name)]


def test_braces_may_hold_more_than_a_name_may(tmp_path: Path) -> None:
    names = [f"{number:0100d}" for number in range(3)]
    found = locations(f"{tmp_path}/{{{','.join(names)}}}.tar")
    assert found == [f"{tmp_path}/{name}.tar" for name in names]


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("{}/x*.tar", r"x\*\.tar: found nothing that matches"),
        ("{}/{{0..1.tar", "unbalanced braces"),
        ("{}/{{0..99999999999}}.tar", "braces for more than 1000000 names; expected fewer"),
        ("{}/{{0..99999999999999999999}}.tar", "braces for more than 1000000 names"),
        ("{}/{{0..2000}}{{0..2000}}.tar", "braces for more than 1000000 names"),
        ("{}/00000.tar::{}/*.tar", r"00000\.tar is named twice"),
        ("{}/00000.tar::{}/../tars/00000.tar", r"00000\.tar is .*00000\.tar again; expected every tar once"),
        ("{}/00009.tar", r"00009\.tar: found nothing; expected a tar"),
        ("{}", r"expected shards named train-\*\.tar\. Tars with other names .*/00000\.tar or .*/\*\.tar"),
        ("{}/..", r"expected shards named train-\*\.tar\. Tars in the folders below .*/\.\./\*/\*\.tar"),
        ("http://host/{{0..3}}/*.tar", r"without blanks .* Name every tar, such as train-\{000000"),
        ("pipe:cat x.tar", "run only if it is given on the command line"),
    ],
)
def test_what_cannot_be_found_is_said(tars: Path, written: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load_index(written.format(tars, tars), "train")


def test_what_a_pattern_matches_is_what_a_shell_would(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("._00000.tar", ".00001.tar", "00000.tar.md5", "00000.tar.idx"):
        (tars / name).write_bytes(b"no tar")
    assert [Path(each).name for each in locations(f"{tars}/*.tar")] == [f"{number:05d}.tar" for number in range(4)]
    assert [Path(each).name for each in locations(f"{tars}/../**/*0.tar")] == ["00000.tar"]
    (tars / "00001.tar.gz").write_bytes(gzip.compress(tar_bytes("x")))
    with pytest.raises(DataError, match=r"00001\.tar\.gz is .*00001\.tar again; expected every tar once"):
        locations(f"{tars}/00001.tar*")
    entries = Path.iterdir

    def unreadable(folder: Path) -> Iterator[Path]:
        if folder == tars:
            raise PermissionError(13, "Permission denied", str(folder))
        return entries(folder)

    monkeypatch.setattr(Path, "iterdir", unreadable)
    with pytest.raises(DataError, match="tars: Permission denied; expected a folder that can be read"):
        locations(f"{tars.parent}/*/*.tar")


def test_tars_of_a_folder_that_are_not_taken_are_reported(tars: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train-0.tar", "val-0.tar", "train-0.tar.idx"):
        (tars / name).write_bytes(tar_bytes("k"))
    assert len(load_index(tars, "train")) == 1
    assert "tars that are not read: 4, such as 00000.tar: names of the split 'train' begin with train-" in caplog.text
    (tars / "training_1.tar").write_bytes(tar_bytes("c"))
    with pytest.raises(DataError, match=r"training_1\.tar: found beside tars named train-; expected names"):
        load_index(tars, "train")
    (tars / "training_1.tar").unlink()
    (tars / "train-0.tgz").write_bytes(gzip.compress(tar_bytes("c")))
    with pytest.raises(DataError, match=r"train-0\.tgz is .*train-0\.tar again; expected every tar once"):
        load_index(tars, "train", cache_dir=tars / "cache")


@pytest.mark.parametrize(
    ("names", "split", "by_name_only", "expected"),
    [
        (["train-0.tar", "val-0.tar"], "train", False, ["train-0.tar"]),
        (["train-0.tar", "val-0.tar", "test-0.tar"], "val", True, ["val-0.tar"]),
        (["00000.tar", "00001.tar"], "train", False, ["00000.tar", "00001.tar"]),
        (["valid_0.tar"], "val", False, ["valid_0.tar"]),
        (["00000.tar"], "val", True, "Set data.val_shards"),
        (["00000.tar", "val-0.tar"], "train", False, "beside tars of other splits"),
        (["00000.tar", "train-0.tar"], "train", False, "beside tars of other splits"),
        (["train_0.tar", "val_0.tar"], "train", False, ["train_0.tar"]),
        (["training.0.tar", "validation.0.tar"], "val", True, ["validation.0.tar"]),
        (["train-0.tar", "training-1.tar"], "train", False, "found tars of train and of training"),
        (["dev-0.tar", "train-0.tar", "val-0.tar"], "val", True, "found tars of dev and of val"),
        (["test-0.tar", "val-0.tar"], "train", False, "found tars of test, val; expected some of the split 'train'"),
        (["val-0.tar"], "train", False, ["val-0.tar"]),
    ],
)
def test_which_tars_belong_to_a_split(names: list[str], split: str, by_name_only: bool, expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            tars_of_split(names, split, by_name_only=by_name_only)
    else:
        assert tars_of_split(names, split, by_name_only=by_name_only) == expected


def test_shards_for_validation_of_their_own(tars: Path) -> None:
    config = load_config(None, [*MANDATORY, f"data.shards={tars}/{{00000..00002}}.tar"])
    assert len(open_split(config, "train")) == 6
    with pytest.raises(DataError, match=r"no tar of the split 'val'.* Set data\.val_shards"):
        open_split(config, "val")
    for val_shards in (f"{tars}/00003.tar", str(tars / "only")):
        (tars / "only").mkdir(exist_ok=True)
        (tars / "only" / "train-0.tar").write_bytes((tars / "00003.tar").read_bytes())
        config = load_config(
            None, [*MANDATORY, f"data.shards={tars}/{{00000..00002}}.tar", f"data.val_shards={val_shards}"]
        )
        assert phrases(open_split(config, "val").index) == ["3a", "3b"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar.bz2", "x.tar.xz", "train-0.tar"])
def test_compressed_tars_are_unpacked_into_the_cache(tmp_path: Path, name: str) -> None:
    compress: Callable[[bytes], bytes] = {"bz2": bz2.compress, ".xz": lzma.compress}.get(name[-3:], gzip.compress)
    (tmp_path / name).write_bytes(compress(tar_bytes("a", "b")))
    with pytest.raises(DataError, match=r"found .*compress.*Decompress it.* data\.cache_dir"):
        load_index(str(tmp_path / name), "train")
    for _ in range(2):
        index = load_index(str(tmp_path / name), "train", cache_dir=tmp_path / "cache")
        assert phrases(index) == ["a", "b"]
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1 and not list((tmp_path / "cache").glob("*.tmp"))
    (tmp_path / name).write_bytes(compress(tar_bytes("c")))
    assert phrases(load_index(str(tmp_path / name), "train", cache_dir=tmp_path / "cache")) == ["c"]


def test_a_compressed_tar_that_ends_early_or_is_too_large_is_refused(tmp_path: Path) -> None:
    path, cache = tmp_path / "x.tar.gz", tmp_path / "cache"
    whole = gzip.compress(tar_bytes(*(f"{i:09d}" for i in range(50))))
    path.write_bytes(whole[:-200])
    with pytest.raises(DataError, match=r"x\.tar\.gz: the compressed data is damaged or ends early"):
        load_index(str(path), "train", cache_dir=cache)
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"data\.cache_gib="):
        load_index(str(path), "train", cache_dir=cache, cache_gib=len(whole) * 1.5 / 2**30)
    assert not list(cache.glob("*.tar")) and not list(cache.glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("written", ["{}/{{00000..00003}}.tar?token=s3cret", "{}/00000.tar::{}/00001.tar"])
def test_tars_of_others_on_a_server(
    tars: Path, tmp_path: Path, ranges: bool, written: str, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(Server(tars, ranges=ranges)) as server, caplog.at_level(logging.DEBUG, "cogvlm_ft"):
        named = written.format(server.url, server.url)
        index = load_index(named, "train", cache_dir=tmp_path / "cache")
        assert phrases(index) == ALL[: len(index)] and len(index) in (4, 8)
        if "token" in written:
            assert all("token=s3cret" in asked for asked in server.asked)
            assert "s3cret" not in caplog.text + "".join(map(str, index.shard_paths))
        if not ranges:
            with pytest.raises(DataError, match=r"does not support ranges\. Set data\.cache_dir") as caught:
                load_index(named, "train")
            assert "s3cret" not in str(caught.value)


def test_a_build_on_a_server_may_need_a_query(tars: Path) -> None:
    (tars / "index.json").write_text("{}")
    with serve(Server(tars)) as server:
        with pytest.raises(DataError, match=r"/index\.json\?\.\.\.: found a damaged index") as caught:
            load_index(f"{server.url}/?token=s3cret", "train")
        assert "s3cret" not in str(caught.value) and server.asked == ["/index.json?token=s3cret"]
        with pytest.raises(DataError, match=r"/sub/index\.json: HTTP 404.*name the tars"):
            load_index(f"{server.url}/sub", "train")


def test_a_data_set_of_the_hub_is_read_offline_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is as huggingface_hub lays it out."""
    repository = tmp_path / "hub" / "datasets--org--photos"
    for folder in ("refs", "snapshots/c0ffee"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / "snapshots" / "c0ffee" / "train-0.tar").write_bytes(tar_bytes("a", "b"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    index = load_index("hf://datasets/org/photos/train-0.tar", "train", cache_dir=tmp_path / "cache")
    assert phrases(index) == ["a", "b"]
    with pytest.raises(DataError, match=r"the hub cannot be reached from here; .*hf download --repo-type dataset"):
        load_index("hf://datasets/org/photos@v2/train-0.tar", "train", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("https://u:p@h/x.tar?X-Amz-Signature=abc", "https://h/x.tar?..."),
        (
            "Max retries exceeded with url: /x.tar?token=abc (Caused by ...)",
            "Max retries exceeded with url: /x.tar?...",
        ),
        ("pipe:curl -H 'Authorization: abc' https://h/x.tar", "pipe:curl ..."),
        ("[{'path': 'https://h/x?a=b'}]", "[{'path': 'https://h/x?...'}]"),
    ],
)
def test_secrets_are_not_shown(address: str, expected: str) -> None:
    assert shown(address).startswith(expected) and "abc" not in shown(address)


def test_parts_of_addresses() -> None:
    assert joined("https://h/a/?k=1", "x.tar") == "https://h/a/x.tar?k=1"
    assert beside("https://h/a/x.tar?k=1", "x.json") == "https://h/a/x.json?k=1"
    assert name_of("s3://b/c/x.tar") == "x.tar" and name_of("https://h/x.tar?n=/y") == "x.tar"
    assert is_tar("https://h/x.tar?k=/z") and is_tar("x.TAR.GZ") and not is_tar("https://h/x?n=a.tar")
    assert local_path("file:///a%20b/x.tar") == "/a b/x.tar" and local_path("file:x.tar") == "x.tar"


def command_settings(tmp_path: Path, written: str) -> list[str]:
    (tmp_path / "source.tar").write_bytes(tar_bytes("a", "b"))
    return [*MANDATORY, f"data.shards={written}".format(tmp_path / "source.tar"), f"data.cache_dir={tmp_path}/cache"]


@pytest.mark.parametrize("written", ["pipe:cat {0}", "pipe:gzip -c {0}", "pipe:cat < {0} | cat"])
def test_a_command_typed_on_the_command_line_is_run(tmp_path: Path, written: str) -> None:
    config = load_config(None, command_settings(tmp_path, written))
    assert phrases(open_split(config, "train").index) == ["a", "b"]


def test_a_command_that_fails_is_an_error(tmp_path: Path) -> None:
    for command, words in (("cat {0}; exit 5", "exited with status 5"), ("no-such-program {0}", "is missing")):
        config = load_config(None, command_settings(tmp_path, f"pipe:{command}"))
        with pytest.raises(DataError, match=rf"pipe:\S+ \.\.\.: .*{words}"):
            open_split(config, "train")
    assert not list((tmp_path / "cache").glob("*.tar"))


@pytest.mark.parametrize("value", ["pipe:touch {0}", ["a", "pipe:touch {0}"], [{"path": "pipe:touch {0}"}]])
@pytest.mark.parametrize("name", ["shards", "val_shards"])
def test_a_command_in_a_file_is_refused(tmp_path: Path, value: Any, name: str) -> None:
    made = tmp_path / "made"
    text = json.dumps({"data": {"shards": "s", name: value}}).replace("{0}", str(made))
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"data\.{name}: found a command .*command line only"):
        load_config(tmp_path / "config.yaml", MANDATORY)
    config = load_config(tmp_path / "config.yaml", [*MANDATORY, f"data.{name}=plain"])
    assert getattr(config.data, name) == "plain" and not made.exists()


def test_a_command_does_not_come_back_from_a_file_by_reference(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {path: 'pipe:touch made'}\ndata: {shards: s}\noutput_dir: x\n")
    with pytest.raises(ConfigError, match="command line only"):
        load_config(tmp_path / "config.yaml", ["data.shards=${model.path}"])
    typed = load_config(None, [*MANDATORY, "data.shards=pipe:cat x.tar"])
    save_config(typed, tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="command line only"):
        load_config(tmp_path / "run.yaml")
    kept = replace(typed, data=replace(typed.data, shards=without_passwords(typed.data.shards)))
    save_config(kept, tmp_path / "run.yaml")  # as in a run folder
    config = load_config(tmp_path / "run.yaml")
    with pytest.raises(DataError, match="command not kept: found nothing"):
        open_split(config, "train")


@given(count=st.integers(1, 12), width=st.integers(1, 6), split=st.sampled_from(["train", "val", "a"]))
@settings(max_examples=30)
def test_braces_name_every_number_once(count: int, width: int, split: str) -> None:
    pattern = f"/none/{split}-{{{0:0{width}d}..{count:0{width}d}}}.tar"
    assert locations(pattern) == [f"/none/{split}-{number:0{width}d}.tar" for number in range(count + 1)]


def test_a_choice_without_a_setting_is_that_of_data_shards() -> None:
    assert SplitChoice().setting == "data.shards"
