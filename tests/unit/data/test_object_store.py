"""Shards in object stores: read by range from servers of S3 and Google Cloud Storage on this machine."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_sources import phrases, tar_bytes

from cogvlm_ft.data import object_store
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.build import BuildSettings, build

fsspec = pytest.importorskip("fsspec")
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two tars of others, and one with a build of ours."""
    root = tmp_path_factory.mktemp("stored")
    others = root / "others"
    others.mkdir()
    for number in range(2):
        (others / f"train-{number}.tar").write_bytes(tar_bytes(f"{number}a", f"{number}b"))
    photo = root / "photos"
    photo.mkdir()
    from PIL import Image

    lines = []
    for name in "abc":
        Image.new("RGB", (30, 20), (ord(name), 0, 0)).save(photo / f"{name}.png")
        lines.append(f'{{"image": "{name}.png", "targets": [{{"phrase": "{name}", "boxes": [[1, 2, 21, 12]]}}]}}\n')
    (photo / "x.jsonl").write_text("".join(lines))
    settings = BuildSettings("jsonl", photo, photo / "x.jsonl", val_fraction=0.0, samples_per_shard=2)
    build(settings, root / "ours", num_workers=1)
    return root


@pytest.fixture(scope="module")
def s3(folder: Path) -> Iterator[str]:
    """Upload the folder to an S3 server; yield the address of the bucket."""
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "k"),
            ("AWS_SECRET_ACCESS_KEY", "s"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ):
            patch.setenv(name, value)
        object_store._file_system.cache_clear()
        client = boto3.client("s3")
        client.create_bucket(Bucket="data")
        for path in folder.rglob("*.*"):
            if path.parent.name != "photos":
                client.upload_file(str(path), "data", path.relative_to(folder).as_posix())
        yield "s3://data"
    object_store._file_system.cache_clear()
    server.stop()


@pytest.fixture(scope="module")
def gcs(folder: Path) -> Iterator[str]:
    """Upload the folder to a server of Google Cloud Storage; yield the address of the bucket."""
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="data")
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        # gcsfs reads this when it is imported: the server does not know the interface that it would use otherwise.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        pytest.importorskip("gcsfs")
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        object_store._file_system.cache_clear()
        store = fsspec.filesystem("gs")
        for path in folder.rglob("*.*"):
            if path.parent.name != "photos":
                store.pipe_file(f"data/{path.relative_to(folder).as_posix()}", path.read_bytes())
        yield "gs://data"
    object_store._file_system.cache_clear()
    server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("store", ["s3", "gcs"])
def test_shards_are_read_by_range(store: str, folder: Path, request: pytest.FixtureRequest) -> None:
    bucket = request.getfixturevalue(store)
    ours = load_index(f"{bucket}/ours", "train")
    assert ours.data_sha256 == load_index(str(folder / "ours"), "train").data_sha256
    assert sorted(phrases(ours)) == ["a", "b", "c"]
    for written in ("others", "others/train-{0..1}.tar", "others/*.tar", "others/train-0.tar::{}/others/train-1.tar"):
        index = load_index(f"{bucket}/{written}".replace("{}", bucket), "train")
        assert phrases(index) == ["0a", "0b", "1a", "1b"]
        assert [str(path) for path in index.shard_paths] == [f"{bucket}/others/train-{i}.tar" for i in range(2)]


@pytest.mark.parametrize("store", ["s3", "gcs"])
def test_what_is_not_there_is_said(store: str, request: pytest.FixtureRequest) -> None:
    bucket = request.getfixturevalue(store)
    for written, words in (
        ("others/train-9.tar", r"train-9\.tar: no such file"),
        ("others/x*.tar", "found nothing that matches"),
        ("nothing", r"found neither index\.json nor train-\*\.tar"),
    ):
        with pytest.raises(DataError, match=words):
            load_index(f"{bucket}/{written}", "train")


@pytest.mark.slow
def test_a_forked_process_reads_too(s3: str) -> None:
    reader = ShardReader(load_index(f"{s3}/others", "train"))
    assert reader.read(0).record.key == "0a"
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_key, [(reader, i) for i in range(4)]) == ["0a", "0b", "1a", "1b"]


def test_a_file_in_s3_replaced_between_two_reads_is_reported(s3: str) -> None:
    import boto3

    client, url = boto3.client("s3"), f"{s3}/replaced/train-0.tar"
    client.put_object(Bucket="data", Key="replaced/train-0.tar", Body=tar_bytes("a", "b"))
    reader = ShardReader(load_index(url, "train"))
    assert reader.read(0).record.key == "a"
    client.put_object(Bucket="data", Key="replaced/train-0.tar", Body=tar_bytes("b", "a"))
    for _ in range(2):
        with pytest.raises(DataError, match=r"found another file .* than when it was read first .*Restore it"):
            reader.read(1)
    with pytest.raises(DataError, match=r"found \d+ bytes; expected 7\. Check that the tar and its index"):
        object_store.read_range(f"{s3}/others/train-0.tar", 0, 3, 7)


def test_a_file_in_google_storage_replaced_between_two_reads_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    stated = {"size": 4, "generation": "1"}

    def cat_file(url: str, start: int, end: int, generation: str) -> bytes:
        if generation != stated["generation"]:
            raise FileNotFoundError(url)
        return b"tar!"[start:end]

    store = SimpleNamespace(info=lambda _: stated, cat_file=cat_file)
    monkeypatch.setattr(object_store, "_file_system", lambda *_: store)
    url = "gs://replaced/train-0.tar"
    assert object_store.size_of(url) == 4 and object_store.read_range(url, 0, 3, 4) == b"tar"
    stated["generation"] = "2"
    with pytest.raises(DataError, match=r"found another file \(2\) than when it was read first \(1\)"):
        object_store.read_range(url, 0, 3, 4)


def _key(task: tuple[ShardReader, int]) -> str:
    return task[0].read(task[1]).record.key
