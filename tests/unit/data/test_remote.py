"""Shards on an HTTP server: sample by sample, or whole shards in a cache."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from servers import Server, serve

from cogvlm_ft.data import object_store, patience, remote, tars, whole_files
from cogvlm_ft.data.index import ShardIndex, load_index
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.errors import DataError, ServerError
from cogvlm_ft.runtime.stop_signals import STOP_SIGNALS, StopRequest
from cogvlm_ft.shards.build import BuildSettings, build

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build four samples of train in two tars, one of val."""
    folder = tmp_path_factory.mktemp("built")
    lines = []
    for name in "abcde":
        pixels = np.random.default_rng(ord(name)).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        lines.append({"image": f"{name}.png", "targets": [{"phrase": "dog", "boxes": [[0, 0, 4, 4]]}]})
    (folder / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = BuildSettings("jsonl", folder, folder / "x.jsonl", val_fraction=0.2, samples_per_shard=2)
    build(settings, folder / "out", num_workers=1)
    return folder / "out"


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again for a tenth of a second only."""
    monkeypatch.setattr(patience, "_DELAYS_S", (0.0, 0.0))
    monkeypatch.setattr(patience, "_LONGEST_DELAY_S", 0.02)
    monkeypatch.setattr(patience._Process, "retry_s", 0.1)


def same_samples(found: ShardIndex, expected: ShardIndex) -> bool:
    readers = ShardReader(found), ShardReader(expected)
    assert len(found) == len(expected) > 0
    samples = [[reader.read(i) for reader in readers] for i in range(len(found))]
    return all(a.record == b.record and a.image.tobytes() == b.image.tobytes() for a, b in samples)


def test_with_ranges_only_the_samples_are_fetched(built: Path) -> None:
    with serve(Server(built)) as server:
        index = load_index(server.url, "train")
        assert index.data_sha256 == load_index(built, "train").data_sha256
        assert same_samples(index, load_index(built, "train"))
        tars = [asked for asked in server.asked if ".tar" in asked]
        assert tars and all("bytes=" in asked for asked in tars)


def test_without_ranges_a_shard_is_fetched_once_and_kept(built: Path, tmp_path: Path) -> None:
    with serve(Server(built, ranges=False)) as server:
        for _ in range(2):
            index = load_index(f"{server.url}/", "train", cache_dir=tmp_path)
            assert same_samples(index, load_index(built, "train"))
        fetched = [asked for asked in server.asked if asked.endswith(".tar")]
        assert sorted(fetched) == ["/train-000000.tar", "/train-000001.tar"]
    assert sorted(path.stat().st_size for path in tmp_path.glob("*.tar")) == sorted(
        path.stat().st_size for path in built.glob("train-*.tar")
    )
    assert not list(tmp_path.glob("*.tmp"))


def test_a_pickled_reader_goes_on(built: Path) -> None:
    with serve(Server(built)) as server:
        reader = pickle.loads(pickle.dumps(ShardReader(load_index(server.url, "train"))))
        assert reader.read(0).image.size == (80, 60)


def test_without_ranges_and_without_a_cache(built: Path) -> None:
    with serve(Server(built, ranges=False)) as server, pytest.raises(DataError, match=r"http.*Set data\.cache_dir"):
        load_index(server.url, "train")


def test_a_cache_too_small_is_said_at_once(built: Path, tmp_path: Path) -> None:
    with serve(Server(built, ranges=False)) as server:
        with pytest.raises(DataError, match=r"data\.cache_gib=9\.\S*e-07\. Raise it"):
            load_index(server.url, "train", cache_dir=tmp_path, cache_gib=1e-6)
        assert not [asked for asked in server.asked if asked.endswith(".tar")]


def test_a_shard_that_was_changed_is_not_used(built: Path, tmp_path: Path, no_waiting: None) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in built.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    data = bytearray((copy / "train-000000.tar").read_bytes())
    data[600] ^= 1
    (copy / "train-000000.tar").write_bytes(data)
    with serve(Server(copy, ranges=False)) as server:
        reader = ShardReader(load_index(server.url, "train", cache_dir=tmp_path))
        with pytest.raises(
            DataError, match=r"http.*train-000000\.tar: found sha256 \w+; expected \w+, as in index\.json"
        ):
            reader.read(0)
    assert not list(tmp_path.glob("*.tar"))
    (copy / "train-000000.tar").write_bytes(data + bytes(512))
    with serve(Server(copy)) as server, pytest.raises(DataError, match="from the same build"):
        load_index(server.url, "train")


def test_a_server_that_fails_for_a_moment(built: Path, no_waiting: None) -> None:
    with serve(Server(built)) as server:
        reader = ShardReader(load_index(server.url, "train"))
        server.failures = 2
        assert reader.read(0).image.size == (80, 60)
        server.failures = 10_000
        with pytest.raises(ServerError, match=r"http.*train-00000.\.tar: HTTP 503; gave up after \d+ attempts in 0 s"):
            reader.read(0)


def test_waiting_for_a_server_is_reported_is_no_hang_and_ends_with_a_stop_signal(
    built: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    num_ticks = iter(range(1000))
    monkeypatch.setattr(patience, "progress", lambda: next(num_ticks))
    monkeypatch.setattr(patience, "_DELAYS_S", (0.0, 0.0))
    monkeypatch.setattr(patience._Process, "reported_at", float("-inf"))
    with serve(Server(built)) as server, StopRequest() as stop_request:
        reader = ShardReader(load_index(server.url, "train"))
        server.failures = 10_000
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        begun = time.monotonic()
        with pytest.raises(ServerError, match="HTTP 503"):
            reader.read(0)
        assert time.monotonic() - begun < 5 and stop_request.seen
    assert next(num_ticks) > 0
    [line] = [record.getMessage() for record in caplog.records if "trying again" in record.getMessage()]
    assert "HTTP 503; trying again for 600 s more (data.retry_s)" in line


def test_a_loader_process_gives_up_soon_so_that_its_rank_answers_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    monkeypatch.setattr(patience._Process, "retry_s", 600.0)
    patience.start_loader_process(0)
    assert patience._Process.retry_s == patience.LOADER_RETRY_S
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_server_that_sends_a_few_bytes_now_and_then_counts_as_away(
    built: Path, monkeypatch: pytest.MonkeyPatch, no_waiting: None
) -> None:
    monkeypatch.setattr(remote, "_PART_S", 0.1)
    with serve(Server(built)) as server:
        reader = ShardReader(load_index(server.url, "train"))
        server.pause_s = 0.15
        with pytest.raises(ServerError, match=r"\.tar: received only \d+ bytes in 0\.1 s"):
            reader.read(0)
        server.pause_s, server.num_bytes_at_once = 0.03, 1 << 16  # slow as a whole, but every part comes in time
        assert reader.read(0).image.size == (80, 60)


def test_a_tar_that_is_replaced_is_noticed(built: Path) -> None:
    with serve(Server(built, etag="a")) as server:
        reader = ShardReader(load_index(server.url, "train"))
        assert reader.read(0).image.size == (80, 60)
        server.etag = "b"  # with the date of before: another mirror
        assert reader.read(0).image.size == (80, 60)
        server.modified = "Thu, 01 Jan 2026 00:00:00 GMT"
        with pytest.raises(DataError, match=r"http.*train-00000.\.tar: found another file \(\"b\"\) than .*\(\"a\"\)"):
            reader.read(0)


def test_a_tar_of_zeros_on_a_server_is_not_fetched_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "_MAX_ZEROS_FETCHED", 1 << 21)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in (("a.jpg", b"x"), ("a.json", b"{}")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    os.truncate(tmp_path / "x.tar", 1 << 25)
    with serve(Server(tmp_path)) as server:
        index = load_index(f"{server.url}/x.tar", "train")
        assert len(index) == 1 and [loss.reason for loss in index.losses] == ["zeros"]
        assert len(server.asked) < 10


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_is_cut(built: Path, tmp_path: Path, no_waiting: None, ranges: bool) -> None:
    with serve(Server(built, ranges=ranges)) as server:
        reader = ShardReader(load_index(server.url, "train", cache_dir=tmp_path))
        server.cut = True
        with pytest.raises(ServerError, match=r"http.*\.tar: .*gave up after \d+ attempt"):
            reader.read(0)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_server_that_is_gone(built: Path, no_waiting: None) -> None:
    with serve(Server(built)) as server:
        reader = ShardReader(load_index(server.url, "train"))
    remote._session.cache_clear()  # its connection would still be served
    with pytest.raises(ServerError, match=r"http.*gave up after \d+ attempt"):
        reader.read(0)
    with pytest.raises(ServerError, match=r"http.*index\.json.*gave up after \d+ attempt"):
        load_index(server.url, "train")


@pytest.mark.parametrize("name", ["index.json", "train-000001.json", "train-000000.tar"])
def test_what_is_not_there_is_named(built: Path, tmp_path: Path, name: str) -> None:
    for path in built.iterdir():
        if path.name != name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with serve(Server(tmp_path)) as server, pytest.raises(DataError, match=rf"http://127.*/{name}"):
        load_index(server.url, "train")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("index.json", b"<html>"),
        ("index.json", b"[]"),
        ("index.json", b'{"version": 1, "splits": {"train": {"shards": [{"path": "../x.tar"}]}}}'),
        (
            "index.json",
            b'{"version": 1, "splits": {"train": {"shards": [{"path": "../x.tar", "size": 1, "sha256": "%s"}]}}}'
            % (b"0" * 64),
        ),
        ("train-000000.json", b'{"size": 1}'),
        ("train-000000.json", b"{"),
    ],
)
def test_damaged_files_are_named(built: Path, tmp_path: Path, name: str, content: bytes) -> None:
    for path in built.iterdir():
        (tmp_path / path.name).write_bytes(content if path.name == name else path.read_bytes())
    with serve(Server(tmp_path)) as server, pytest.raises(DataError, match=rf"http.*/{name}"):
        load_index(server.url, "train")


@pytest.mark.parametrize(
    "url",
    ["pipe:touch {}", "pipe://touch {}", "ftp://x/y", "scp://x/y", "http://x/*.tar", "http://x/a b", "http://x/y#z"],
)
def test_addresses_that_are_not_opened(tmp_path: Path, url: str) -> None:
    with pytest.raises(DataError, match="expected"):
        load_index(url.format(tmp_path / "made"), "train")
    assert not list(tmp_path.iterdir())


def test_no_password_is_shown() -> None:
    with pytest.raises(DataError) as caught:
        load_index("ftp://me:secret@host/x", "train")
    assert "secret" not in str(caught.value) and "ftp://host/x" in str(caught.value)


@pytest.fixture
def without_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    """Object stores as they are read where the extras are not installed."""
    monkeypatch.setattr(object_store, "_file_system", lambda scheme, pid: None)


def gsutil(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program of that name first in the search path."""
    program = folder / "bin" / "gsutil"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


@pytest.mark.slow
def test_an_object_store_is_read_by_its_own_program(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_fsspec: None
) -> None:
    gsutil(tmp_path, f'[ "$1" = cat ] && exec cat "{built}/$(basename "$2")"', monkeypatch)
    index = load_index("gs://bucket/folder", "train", cache_dir=tmp_path / "cache")
    assert same_samples(index, load_index(built, "train"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"gs://bucket/folder/index\.json.*program .* missing"):
        load_index("gs://bucket/folder", "train", cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match=r"pip install 'cogvlm-ft\[s3\]', or set USE_AIS_FOR=s3"):
        load_index("s3://bucket/folder", "train")


def alive(pid_file: Path) -> bool:
    for _ in range(100):
        if pid_file.is_file() and pid_file.read_text().strip():
            break
        time.sleep(0.05)
    stat = Path("/proc", pid_file.read_text().strip(), "stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def ends(pid_file: Path) -> bool:
    return any(not alive(pid_file) or time.sleep(0.05) for _ in range(100))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["echo data; exit 3", "head -c 3000000 /dev/zero; sleep 1000"])
def test_what_an_opener_has_started_ends_with_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    gsutil(tmp_path, f"sleep 1000 & echo $! > {tmp_path}/pid; {script}", monkeypatch)
    monkeypatch.setattr(whole_files, "_SILENCE_S", 10)  # the first opener leaves a process that holds its pipe
    with pytest.raises(DataError if "zero" in script else OSError, match=r"at most|no data"):
        list(whole_files.stream("gs://b/x.tar", 2_000_000))
    assert ends(tmp_path / "pid")


def test_what_an_opener_has_started_ends_if_we_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gsutil(tmp_path, f"sleep 1000 & echo $! > {tmp_path}/pid; sleep 1000", monkeypatch)
    code = "from cogvlm_ft.data.whole_files import stream; list(stream('gs://b/x.tar', 10))"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
        assert alive(tmp_path / "pid")
        process.kill()
    assert ends(tmp_path / "pid")
