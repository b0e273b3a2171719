"""Generation on two ZeRO-3 ranks: what is gathered, that no rank hangs, and that training continues as before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import run
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("gather_rules.py")


@pytest.fixture(scope="module")
def reports(shards: Path, start_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("gather")
    text = run([PROGRAM, start_model, shards, folder], 2, folder / "logs")
    lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"rank"')]
    assert len(lines) == 2
    return sorted(lines, key=lambda line: line["rank"])


def is_vision(name: str) -> bool:
    return "vision" in name


@pytest.mark.parametrize("when", ["before", "after_a_step", "second_batch"])
def test_decoded_tokens_gather_no_vision(reports: list[dict], when: str) -> None:
    """Gather it neither for a call nor ahead of one; the pass over the image does, so the recorder works."""
    for report in reports:
        seen = report[when]
        assert seen["num_passes"] > 2
        assert {"model.layers.0.self_attn.vision_expert_query_key_value.weight", "model.vision.boi"} <= set(
            seen["gathered_first"]
        )
        assert "model.layers.1.mlp.language_mlp.up_proj.weight" in seen["gathered_later"]
        assert not [name for name in seen["gathered_later"] if is_vision(name)]
        assert not [name for name in seen["whole_later"] if is_vision(name)]


def test_ranks_with_different_answers_make_the_same_passes(reports: list[dict]) -> None:
    assert reports[0]["lengths"] != reports[1]["lengths"]
    assert max(reports[0]["lengths"]) < max(reports[1]["lengths"])
    for when in ("before", "after_a_step", "second_batch"):
        assert reports[0][when]["num_passes"] == reports[1][when]["num_passes"]


def test_gathered_once_each_rank_goes_its_own_way(reports: list[dict]) -> None:
    for report in reports:
        assert report["once"]["gathered_first"] == report["once"]["gathered_later"] == []
        assert report["once_needs_ranks"] is False
        assert report["layerwise_needs_ranks"] is True
    assert reports[0]["once"]["num_passes"] < reports[1]["once"]["num_passes"]


def test_answers_are_those_of_the_model_without_zero(reports: list[dict]) -> None:
    for report in reports:
        assert report["layerwise_equal"] and report["once_equal"] and report["second_equal"]
        assert report["evaluations_equal"] == [True] * 7


def test_afterwards_everything_is_as_before(reports: list[dict]) -> None:
    for report in reports:
        assert report["hooks_equal"] and report["partitioned"]
        assert report["losses"] == report["losses_without"]
        assert len(set(report["losses"])) == 3


def test_all_ranks_choose_alike(reports: list[dict], start_model: Path) -> None:
    """Give only rank 0 the memory at the second call."""
    assert [report["fits"] for report in reports] == [[True, False], [True, False]]
    weights = load_file(start_model / "model.safetensors")
    numel = sum(tensor.numel() for name, tensor in weights.items() if not name.endswith("inv_freq"))
    assert {report["whole_bytes"] for report in reports} == {4 * numel}
