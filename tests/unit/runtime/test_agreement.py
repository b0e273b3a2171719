"""Ranks that have other settings or files than rank 0."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cogvlm_ft.config import load_config
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.runtime import agreement
from cogvlm_ft.runtime.agreement import check_agreement, comparable_settings


def among(others: list[dict[str, Any]]) -> Callable[[Any], list[Any]]:
    return lambda mine: [mine, *((f"node{number}", facts) for number, facts in enumerate(others, 1))]


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ([{"data.shards": "a", "model.path": None}], None),
        (
            [{"data.shards": "a", "model.path": None}, {"data.shards": "b", "model.path": "m"}],
            "^data.shards: found 'b'",
        ),
        (
            [{"data.shards": "a", "model.path": "x"}],
            r"^model\.path: found 'x' on rank 1 \(node1\), 'm' on rank 0",
        ),
    ],
)
def test_the_first_difference_is_named(
    others: list[dict[str, Any]], words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "gather_to_main", among(others))
    facts = {"data.shards": "a", "model.path": "m"}
    if words is None:
        check_agreement(facts)
    else:
        with pytest.raises(ConfigError, match=words):
            check_agreement(facts)


def test_paths_may_differ_and_all_else_must_not(tmp_path: Path) -> None:
    settings = ["model.path=a", "data.shards=a", "output_dir=a", "tracking.name=a", "data.num_workers=1"]
    first = comparable_settings(load_config(None, settings))
    assert first == comparable_settings(load_config(None, [setting.replace("=a", "=b") for setting in settings]))
    assert first != comparable_settings(load_config(None, [*settings, "data.augment.crop=0.5"]))
    assert first != comparable_settings(load_config(None, [*settings, "train.monitor={mean_iou: 2.0}"]))
