"""Printed lines are short, and progress is visible where there is no terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cogvlm_ft import terminal
from cogvlm_ft.run_folder import RunFolder
from cogvlm_ft.terminal import progress_bar
from cogvlm_ft.train.printed_lines import BAR_WITH_END, evaluation_line, metrics_before, step_line

NUMBERS = {"loss": 0.12345, "lr": 5e-5, "grad_norm": 0.98765, "images_per_s": 123.456, "data_wait_fraction": 0.1}
NUMBERS |= {"memory_gib": 72.123, "step_s": 4.0, "num_bad": 0.0, "num_cut_boxes": 0.0, "num_skipped": 0.0}


def test_the_line_of_a_step_fits_100_columns_and_has_the_time_left() -> None:
    line = step_line(10_000, 50_000, NUMBERS)
    assert len(line) <= 100 and line.endswith("left 44.4 h")
    assert "boxes cut" not in line
    assert step_line(1, 106, NUMBERS).endswith("left 7 min") and step_line(1, 11, NUMBERS).endswith("left 40 s")
    assert step_line(1, 2, {**NUMBERS, "num_bad": 3.0}).endswith("bad 3")


def test_the_line_of_an_evaluation_has_five_numbers_and_their_change(tmp_path: Path) -> None:
    metrics = {"mean_iou": 0.5, "acc@0.5": 0.6, "not_found_acc": 0.7, "unreadable": 0.1, "f1@0.5": 0.4, "ap": 0.3}
    folder = RunFolder(tmp_path)
    assert metrics_before(folder, 8) == {}
    for step, value in ((4, 0.25), (12, 0.9)):
        folder.evaluation(step).mkdir(parents=True)
        (folder.evaluation(step) / "metrics.json").write_text(json.dumps({"mean_iou": value, "about": {}}))
    line = evaluation_line(2, 8, metrics, metrics_before(folder, 8), "ap")
    assert line == (
        "epoch 2 (step 8)  ap 0.300  mean_iou 0.500 (+0.25)  acc@0.5 0.600  not_found_acc 0.700\n    unreadable 0.100"
    )
    lines = evaluation_line(12.5, 123456, metrics, dict.fromkeys(metrics, 0.0), "mean_iou").splitlines()
    assert len(lines) == 2 and max(map(len, lines)) <= 100


def test_progress_is_lines_in_a_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "LINE_S", 0.0)
    assert list(progress_bar([1, 2], desc="evaluate", unit="batch")) == [1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("evaluate: 1/2, ") and line.endswith(" left") for line in lines), lines
    assert not list(progress_bar([], desc="evaluate", unit="batch", is_shown=False)) and not capsys.readouterr().err


def test_the_bar_of_training_names_its_end() -> None:
    shown = {"n": 5, "total": 10, "elapsed": 50.0, "ncols": 100, "prefix": "train", "bar_format": BAR_WITH_END}
    line = terminal.tqdm.format_meter(**shown)
    assert line.startswith("train: 5/10") and "00:50 + 00:50, ends " in line
