"""What scans of tars found is kept in data.cache_dir, and used as long as the tar is the same."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from servers import Server, serve

from cogvlm_ft.data import shard, versions
from cogvlm_ft.data.index import ShardIndex, load_index
from cogvlm_ft.data.tars import Scan, scan_tar
from cogvlm_ft.data.versions import Noted, adopt, noted


def write_tar(path: Path, *keys: str) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in [f"{key}.{extension}" for key in keys for extension in ("jpg", "json")]:
            info = tarfile.TarInfo(name)
            info.size = 5
            tar.addfile(info, io.BytesIO(b"bytes"))
    return path


def keys_of(index: ShardIndex) -> list[str]:
    return [index.key(i) for i in range(len(index))]


def test_a_local_tar_is_scanned_again_only_if_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned = []

    def counted(path: Path) -> Scan:
        scanned.append(path.name)
        return scan_tar(path)

    monkeypatch.setattr(shard, "scan_tar", counted)
    path, cache = write_tar(tmp_path / "x.tar", "a", "b\udc80"), tmp_path / "cache"
    found = [load_index(str(path), "train", cache_dir=cache) for _ in range(3)]
    assert scanned == ["x.tar"] and len({index.data_sha256 for index in found}) == 1
    assert keys_of(found[0]) == keys_of(found[2]) == ["a", "b\\udc80"]
    [kept] = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:-20])  # as a full disk or a crash leaves it
    assert keys_of(load_index(str(path), "train", cache_dir=cache)) == keys_of(found[0])
    assert len(scanned) == 2
    before = path.stat()
    write_tar(path, "c", "b\udc80")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert keys_of(load_index(str(path), "train", cache_dir=cache)) == ["c", "b\\udc80"]


def test_a_tar_on_a_server_is_scanned_again_if_its_version_changes_or_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "x.tar", "a")
    with serve(Server(tmp_path, etag="one")) as server:

        def num_requests() -> int:
            monkeypatch.setattr(versions, "_first", {})  # each is another start
            before = len(server.asked)
            assert keys_of(load_index(f"{server.url}/x.tar?token=t", "train", cache_dir=tmp_path / "cache")) == ["a"]
            return len(server.asked) - before

        scan, kept = num_requests(), num_requests()
        server.etag = "two"
        assert kept == num_requests() - 1 == scan - 1
        server.etag = ""
        assert num_requests() == num_requests() == scan


def test_a_rank_takes_over_an_index_only_if_it_sees_the_same_tars(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", "a")
    files = noted(load_index(str(path), "train").shard_paths)
    assert list(files.states) == [path] and adopt(files)
    assert not adopt(Noted({}, {tmp_path / "absent.tar": path.stat()}))
    other = write_tar(tmp_path / "y.tar", "a")
    assert not adopt(Noted({}, {other: path.stat()}))
