"""Files with names that are not UTF-8, loops of links, and disks that fail while a file is read."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path

import pytest

from cogvlm_ft.plain_files import read_bytes, read_json, real_path, write_text


def test_the_name_of_a_folder_that_is_not_utf_8_is_written_and_read_back(tmp_path: Path) -> None:
    """As of an archive made on Chinese Windows."""
    folder = tmp_path / os.fsdecode("照片".encode("gbk"))
    folder.mkdir()
    write_text(folder / "a.json", json.dumps({"folder": str(folder)}, ensure_ascii=False))
    assert Path(read_json(folder / "a.json")["folder"]) == folder


def test_a_loop_of_links_has_a_path(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "there").symlink_to(tmp_path)
    assert real_path(tmp_path / "loop" / "x") == tmp_path / "loop" / "x"
    assert real_path(tmp_path / "there" / "x") == tmp_path / "x"


def test_a_disk_that_fails_while_a_file_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text("{}")

    class Failing(io.BufferedReader):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(io, "open", lambda path, *_, **__: Failing(io.FileIO(path)))
    with pytest.raises(OSError, match="Input/output error: ") as raised:
        read_bytes(tmp_path / "a.json")
    assert raised.value.filename == str(tmp_path / "a.json")
