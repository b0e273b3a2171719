"""The word that reports how an attempt ended, for the program that may start it again."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cogvlm_ft.launch.train import main as train
from cogvlm_ft.runtime.outcome import OUTCOME_VARIABLE, write_outcome


def test_the_last_word_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "outcome"
    monkeypatch.setenv(OUTCOME_VARIABLE, str(path))
    write_outcome("progress")
    write_outcome("stopped")
    assert path.read_text() == "stopped\n"
    assert [found.name for found in tmp_path.iterdir()] == ["outcome"]


def test_nothing_is_written_where_nobody_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(OUTCOME_VARIABLE, raising=False)
    write_outcome("finished")
    monkeypatch.setenv(OUTCOME_VARIABLE, str(tmp_path / "missing" / "outcome"))
    with caplog.at_level(logging.WARNING):
        write_outcome("finished")
    assert "cannot be written" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OUTCOME_VARIABLE, str(tmp_path / "outcome"))
    assert train(["train.lrr=1"]) == 2
    assert (tmp_path / "outcome").read_text() == "refused\n"
