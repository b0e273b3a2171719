"""What ends a demo or rehearsal before it builds anything: another one, a training that is left, a locale."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cogvlm_ft.launch import demo, rehearse
from cogvlm_ft.runtime.run_lock import Use, run_lock


def start_demo(folder: Path) -> int:
    return demo.main(["--num-scenes", "2", f"output_dir={folder}/run", f"data.shards={folder}/shards"])


def start_rehearsal(folder: Path) -> int:
    return rehearse.main([".", "--out", str(folder)])


@pytest.mark.parametrize(
    ("start", "work", "setting"), [(start_demo, "demo", "output_dir"), (start_rehearsal, "rehearsal", "--out")]
)
@pytest.mark.parametrize("is_killed", [False, True])
def test_a_second_one_in_the_same_folder_is_refused_at_once(
    start: Callable[[Path], int],
    work: str,
    setting: str,
    is_killed: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """is_killed: of the first one, the training alone still runs."""
    owned = tmp_path / "run" if is_killed else tmp_path
    with run_lock(owned, Use("", "", "")):
        assert start(tmp_path) == 2
    assert {path.name for path in tmp_path.iterdir()} <= {"run", ".lock-000001"}, "nothing is built"
    printed = capsys.readouterr()
    kind = "training run" if is_killed else work
    assert f"{owned}: another {kind} is writing there: process {os.getpid()} on " in printed.err
    assert printed.err.endswith(f"or choose another {setting}\n") and printed.err.count("\n") == 1 and not printed.out


@pytest.mark.parametrize("start", [start_demo, start_rehearsal])
def test_a_locale_in_which_training_would_fail_is_refused_at_once(
    start: Callable[[Path], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("locale.getpreferredencoding", lambda do_setlocale=True: "GBK")
    assert start(tmp_path) == 2
    printed = capsys.readouterr()
    assert "locale: found the encoding GBK" in printed.err and not printed.out and not list(tmp_path.iterdir())
