"""Which evaluation was the best, by one metric or several, and what is no gain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cogvlm_ft.checkpoints.checkpoint import Best
from cogvlm_ft.config import load_config, save_config
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.evaluate.monitor import monitor_name, monitor_value
from cogvlm_ft.settings import TrainConfig
from cogvlm_ft.train.early_stopping import updated_best

METRICS = {"mean_iou": 0.5, "not_found_acc": 0.8, "unreadable": 0.1, "chrf": 40.0, "acc@0.5/size=small": 0.25}


def best_of(values: list[float], **settings: Any) -> Best:
    best = None
    for step, value in enumerate(values):
        best = updated_best(best, value, step, TrainConfig(**settings))
    assert best is not None
    return best


@pytest.mark.parametrize(
    ("values", "settings", "wanted"),
    [
        ([0.1], {}, Best(0.1, 0)),
        ([0.1, 0.3, 0.2], {}, Best(0.3, 1, 1)),
        ([0.3, 0.3, 0.3], {}, Best(0.3, 0, 2)),
        ([0.3, 0.31, 0.32, 0.2], {"min_gain": 0.05}, Best(0.3, 0, 3)),
        ([0.3, 0.33, 0.36], {"min_gain": 0.05}, Best(0.36, 2)),  # small gains add up
        ([0.3, 0.2, 0.25], {"monitor": "unreadable"}, Best(0.2, 1, 1)),
        ([0.3, 0.28, 0.2], {"monitor": "unreadable/language=zh", "min_gain": 0.05}, Best(0.2, 2)),
        ([-0.3, -0.2], {"monitor": {"unreadable": 1.0}}, Best(-0.2, 1)),  # the minus is in the sum
    ],
)
def test_best(values: list[float], settings: dict[str, Any], wanted: Best) -> None:
    assert best_of(values, **settings) == replace(wanted, monitor=str(settings.get("monitor", "mean_iou")))


def test_another_monitor_is_compared_anew() -> None:
    best = best_of([0.9, 0.8], monitor="mean_iou")
    for step, monitor in enumerate(["unreadable", {"mean_iou": 1.0}, "mean_iou"], start=2):
        best = updated_best(best, 0.5, step, TrainConfig(monitor=monitor))
        assert best == Best(0.5, step, monitor=str(monitor))


@pytest.mark.parametrize(
    ("monitor", "name", "value"),
    [
        ("mean_iou", "mean_iou", 0.5),
        ("unreadable", "unreadable", 0.1),
        ("acc@0.5/size=small", "acc@0.5/size=small", 0.25),
        ({"mean_iou": 1.0, "not_found_acc": 0.5}, "monitor", 0.9),
        ({"mean_iou": 1, "unreadable": 2.0, "chrf": 0.01}, "monitor", 0.7),
    ],
)
def test_value(monitor: Any, name: str, value: float) -> None:
    assert monitor_name(monitor) == name
    assert monitor_value(METRICS, monitor) == pytest.approx(value)


@pytest.mark.parametrize("monitor", ["precision@0.5", {"mean_iou": 1.0, "precision@0.5": 1.0}, "loss"])
def test_an_evaluation_without_a_value_brings_no_gain(monitor: Any) -> None:
    """Precision has none without a single box; a NaN would never be exceeded."""
    assert monitor_value({**METRICS, "loss": float("nan")}, monitor) is None
    train = TrainConfig(monitor=monitor)
    assert updated_best(None, None, 0, train) is None
    best = updated_best(None, 0.5, 1, train)
    assert updated_best(best, None, 2, train) == Best(0.5, 1, 1, monitor=str(monitor))


def load(*settings: str) -> TrainConfig:
    return load_config(None, ["output_dir=o", "model.path=m", "data.shards=s", *settings]).train


def test_several_metrics_survive_the_run_s_config_file(tmp_path: Path) -> None:
    config = load_config(None, ["output_dir=o", "model.path=m", "data.shards=s", "train.monitor={chrf: 0.01, ap: 1}"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert load_config(tmp_path / "config.yaml", ["train.monitor=ap"]).train.monitor == "ap"


def test_settings() -> None:
    assert load("train.monitor=acc@0.5").monitor == "acc@0.5"
    several = load("train.monitor={mean_iou: 1.0, acc@0.5/size=small: 2}", "train.min_gain=0.01")
    assert (several.monitor, several.min_gain) == ({"mean_iou": 1.0, "acc@0.5/size=small": 2}, 0.01)


@pytest.mark.parametrize("value", ["{}", "[mean_iou]", "{mean_iou: best}", "{mean_iou: 0}", "{mean_iou: -1}", "null"])
def test_what_is_no_monitor(value: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.monitor=.*names with weights above 0"):
        load(f"train.monitor={value}")


def test_a_negative_gain() -> None:
    with pytest.raises(ConfigError, match=r"train\.min_gain=-0\.1: expected at least 0"):
        load("train.min_gain=-0.1")
