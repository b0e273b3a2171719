"""Which train.monitor a validation split can produce, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config

from cogvlm_ft.config import load_config
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.record import Record
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.evaluate.measurable import check_monitor
from cogvlm_ft.grounding.targets import Turn

Check = Callable[..., None]


@pytest.fixture
def check(shards: Path) -> Check:
    def check(monitor: Any = "mean_iou", *changes: str) -> None:
        settings = ["output_dir=o", "model.path=m", f"data.shards={shards}", f"train.monitor={monitor}", *changes]
        check_monitor(load_config(None, settings), ShardReader(load_index(shards, "val")), tiny_config())

    return check


@pytest.mark.parametrize(
    "monitor",
    [
        *("mean_iou", "acc@0.5_expected", "not_found_acc", "precision@0.5", "ap", "chrf", "num_bad"),
        *("mean_iou/language=zh", "{mean_iou: 1.0, text_exact: 0.5, unreadable: 2}"),
    ],
)
def test_metrics_of_present_and_absent_targets_and_texts(check: Check, monitor: str) -> None:
    check(monitor)


def test_a_name_that_no_evaluation_has(check: Check) -> None:
    with pytest.raises(ConfigError, match=r"found acc@0\.6, but 9 validation images .* one of acc@0\.5, .*mean_iou"):
        check("acc@0.6")
    with pytest.raises(ConfigError, match=r"found mean_iou/size=tiny, .*such as acc@0\.5/size=small"):
        check("{mean_iou/size=tiny: 1, ap: 1}")
    with pytest.raises(ConfigError, match="found probe_same"):
        check("probe_same")
    check("probe_same", "evaluate.probe=p.jsonl")


@pytest.mark.parametrize(
    ("kind", "measurable"), [("absent", "not_found_acc"), ("texts", "text_exact"), ("nothing", "num_bad")]
)
def test_images_without_boxes(check: Check, monkeypatch: pytest.MonkeyPatch, kind: str, measurable: str) -> None:
    real = ShardReader.read_record

    def read_record(self: ShardReader, i: int) -> Record:
        record = real(self, i)
        targets = [replace(target, boxes_xyxy=()) for target in record.targets]
        turns = [Turn("How many?", "three", None)]
        return replace(record, targets=targets if kind == "absent" else [], turns=turns if kind == "texts" else [])

    monkeypatch.setattr(ShardReader, "read_record", read_record)
    with pytest.raises(ConfigError) as caught:
        check()
    about = "they have no questions" if kind == "nothing" else "none of their questions has boxes as its answer"
    assert about in str(caught.value)
    assert kind == "nothing" or f"such as train.monitor={measurable}" in str(caught.value)
    check(measurable)
