"""An evaluation of a run with averaged weights: what each of both chose stays with it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cogvlm_ft.build import Run
from cogvlm_ft.checkpoints.checkpoint import TrainState, read_state, record_evaluation
from cogvlm_ft.checkpoints.choice import chosen_boxes
from cogvlm_ft.config import load_config
from cogvlm_ft.evaluate.evaluate import Evaluation
from cogvlm_ft.grounding.confidence import KeptBoxes
from cogvlm_ft.run_folder import RunFolder, step_name
from cogvlm_ft.runtime.stop_signals import StopRequest
from cogvlm_ft.train import loop

OF_WEIGHTS, OF_AVERAGES = KeptBoxes(0.1), KeptBoxes(0.2, only_best=True)


def test_weights_and_averages_keep_their_own_choice_of_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice of the averages was lost, and that of the weights went into an export of the averages."""
    settings = ["train.ema=0.9", "train.monitor=ema_mean_iou", "model.path=b", "data.shards=c", "data.tiles.side_px=64"]
    run = cast(Run, SimpleNamespace(config=load_config(None, [*settings, f"output_dir={tmp_path}"])))
    object.__setattr__(run, "folder", RunFolder(tmp_path))

    def measured(kept: KeptBoxes) -> Any:
        return lambda *_: Evaluation({"mean_iou": 0.5 + kept.min_confidence}, [], [], kept=kept)

    monkeypatch.setattr(loop, "measure", measured(OF_WEIGHTS))
    monkeypatch.setattr(loop, "measure_averages", measured(OF_AVERAGES))
    state = loop.evaluate_epoch(run, TrainState(step=3), None, cast(StopRequest, None))
    assert (state.kept_boxes, state.averaged_kept_boxes) == (OF_WEIGHTS, OF_AVERAGES)
    assert state.best and state.best.value == pytest.approx(0.7)
    first = loop.evaluate_epoch(run, TrainState(), None, cast(StopRequest, None))
    assert first.averaged_kept_boxes == OF_WEIGHTS, "the weights are their own average before training"

    checkpoint = tmp_path / step_name(3)
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text('{"step": 3, "best": null}')
    record_evaluation(tmp_path, state)
    assert read_state(checkpoint).averaged_kept_boxes == OF_AVERAGES
    assert [chosen_boxes(checkpoint, averaged=averaged) for averaged in (False, True)] == [OF_WEIGHTS, OF_AVERAGES]
