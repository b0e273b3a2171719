"""The layout of the dashboard: built by the real package, compared with what a real run logs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.grounding.metrics import AnswerScore, summarize
from cogvlm_ft.launch.workspace import main
from cogvlm_ft.report.workspace import SPLITS, build_workspace, describe_workspace, save_workspace
from cogvlm_ft.tracking.wandb_run import train_key, val_key


def sections(view: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found = view["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in found}


@pytest.fixture(scope="module")
def panels() -> dict[str, list[dict[str, Any]]]:
    return sections(describe_workspace("shapes"))


def keys(panels: list[dict[str, Any]]) -> Iterator[str]:
    for panel in panels:
        yield from panel["config"].get("metrics", [])


def test_the_sections_stand_in_this_order(panels: dict[str, list[dict[str, Any]]]) -> None:
    names = list(panels)
    assert names[:4] == ["Validation", "Training", "Pictures", "Predictions"]
    assert names[4:-2] == list(SPLITS.values())
    assert names[-2:] == ["Speed", "System"]
    assert all(panels.values())


def test_validation_shows_metrics_that_are_measured(panels: dict[str, list[dict[str, Any]]]) -> None:
    present = AnswerScore("present", iou=0.6, num_answered=1, num_true=1, num_hits=1)
    scores = [present, AnswerScore("absent"), AnswerScore("text")]
    measured = {val_key(name) for name in summarize(scores)}
    shown = list(keys(panels["Validation"]))
    assert len(shown) >= 6 and set(shown) <= measured
    assert {panel["config"]["xAxis"] for panel in panels["Validation"]} == {"epoch"}


def test_training_and_speed_are_over_the_step(panels: dict[str, list[dict[str, Any]]]) -> None:
    assert {panel["config"]["xAxis"] for panel in panels["Training"] + panels["Speed"]} == {"train/step"}
    assert train_key("loss") in keys(panels["Training"])
    assert {train_key("images_per_s"), train_key("data_wait_fraction"), train_key("mfu")} <= set(keys(panels["Speed"]))


def test_a_breakdown_shows_every_value_of_its_group_and_nothing_else(panels: dict[str, list[dict[str, Any]]]) -> None:
    (panel,) = (p for p in panels["By target size (COCO)"] if "acc@0.5" in p["config"]["chartTitle"])
    assert panel["config"]["useMetricRegex"] is True
    pattern = re.compile(panel["config"]["metricRegex"])
    for value in ("small", "medium", "large", "<1%"):
        assert pattern.search(val_key(f"acc@0.5/size={value}"))
    for name in ("acc@0.5", "acc@0.75/size=small", "acc@0.5/language=zh", "mean_iou/size=small"):
        assert not pattern.search(val_key(name)), name


def test_pictures_and_predictions_have_their_panels(panels: dict[str, list[dict[str, Any]]]) -> None:
    media = [panel["config"]["mediaKeys"] for panel in panels["Pictures"]]
    assert media == [["pictures/same"], ["pictures/worst"], ["pictures/newly_lost"]]
    assert "predictions/table" in json.dumps(panels["Predictions"])


def test_no_panel_covers_another(panels: dict[str, list[dict[str, Any]]]) -> None:
    for name, placed in panels.items():
        boxes = [panel["layout"] for panel in placed]
        cells = [(x, y) for b in boxes for x in range(b["x"], b["x"] + b["w"]) for y in range(b["y"], b["y"] + b["h"])]
        assert len(cells) == len(set(cells)), name
        assert max(x for x, _ in cells) < 24


def test_the_program_prints_the_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--project", "shapes", "--print"]) == 0
    view = json.loads(capsys.readouterr().out)
    assert (view["project"], view["displayName"]) == ("shapes", "CogVLM grounding")
    assert len(sections(view)) > 8


def test_without_a_key_nothing_is_sent(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--project", "shapes"]) == 2
    assert "no key for W&B" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        save_workspace("me", "shapes")


def test_without_the_package_the_user_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(ConfigError, match=r'pip install -e "\.\[workspace\]"'):
        build_workspace("me", "shapes")
