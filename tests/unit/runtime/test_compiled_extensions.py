"""Where DeepSpeed compiles its optimizer if the home folder cannot be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.runtime.compiled_extensions import VARIABLE, build_root, use_writable_folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"torch_extensions-{os.getuid()}"


def test_a_writable_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "own"))
    use_writable_folder()
    assert build_root() == tmp_path / "own"


def test_an_unwritable_home(temporary: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(VARIABLE, "/proc/nohome/x")
    use_writable_folder()
    assert build_root() == temporary and temporary.stat().st_mode & 0o777 == 0o700
    assert "/proc/nohome/x cannot be written (No such file or directory): DeepSpeed compiles in" in caplog.text


def test_a_folder_that_others_may_write_is_refused(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/proc/nohome")
    temporary.mkdir()
    temporary.chmod(0o777)
    with pytest.raises(ConfigError, match=r"belongs to another user.* Set TORCH_EXTENSIONS_DIR to one that every node"):
        use_writable_folder()
