"""Multiplications, seconds and the program that prints them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_memory import PARAMETERS_17B, SMALL, config, small_batch
from torch.utils.flop_counter import FlopCounterMode

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.launch.plan import main
from cogvlm_ft.model import CogVLMConfig, CogVLMForCausalLM
from cogvlm_ft.planning.activations import MicroBatchShape
from cogvlm_ft.planning.memory import Cluster, Planner
from cogvlm_ft.planning.step_time import Speeds, StepTime, count_flops, time_step
from cogvlm_ft.planning.tables import HEAD


def test_multiplications_are_those_of_a_real_pass() -> None:
    """torch counts the products of a forward pass on CPU; attention, which it counts with its masked half, is ours."""
    sequences = MicroBatchShape(num_images=2, turns=3, turn_tokens=10, labelled_tokens=4)
    model = CogVLMForCausalLM(SMALL).train()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**small_batch(sequences), return_logits=False)
    products = {name.__name__.split(".")[0]: flops for name, flops in counter.get_flop_counts()["Global"].items()}
    linear = sum(products.get(name, 0) for name in ("mm", "addmm", "bmm", "convolution"))
    prefix, text = SMALL.num_patches + 3, sequences.text_tokens
    pairs = prefix**2 / 2 + text * prefix + 3 * 10**2 / 2
    attention = 2 * 4 * (2 * 48 * (SMALL.num_patches + 1) ** 2 + 3 * 64 * pairs)
    assert count_flops(model, sequences)[0] == pytest.approx(linear + attention, rel=1e-9)


def test_recomputed_multiplications() -> None:
    counts = {}
    for which in ("none", "vision", "language", "all"):
        planner = Planner(config(f"model.gradient_checkpointing={which}"), SMALL, Cluster(1, 1))
        counts[which] = count_flops(planner.model, MicroBatchShape())
    forward = counts["none"][0]
    assert counts["none"][1] == 0 and counts["all"][0] == forward
    assert counts["vision"][1] + counts["language"][1] == pytest.approx(counts["all"][1])
    assert counts["all"][1] < forward


@pytest.fixture(scope="module")
def planner_17b() -> Planner:
    return Planner(config("train.global_batch_size=32", "train.precision=bf16"), CogVLMConfig(), Cluster(1, 8))


def step_of(planner: Planner, **speeds: float) -> StepTime:
    estimate = planner.estimate(MicroBatchShape(), evaluation=False)
    return time_step(planner, estimate, MicroBatchShape(), Speeds(**{"tflops": 989.0, **speeds}))


@pytest.mark.slow
def test_time_follows_the_speeds(planner_17b: Planner) -> None:
    usual = step_of(planner_17b)
    assert usual.num_micro_batches == 4 and usual.num_tokens == 32 * (1225 + 3 + 240)
    assert step_of(planner_17b, mfu=0.8).compute_s == pytest.approx(usual.compute_s / 2)
    assert usual.compute_s == pytest.approx(usual.flops / (8 * 989e12 * 0.4))
    # Weights twice and gradients once, in bf16, for each of four passes; seven eighths of them come from others.
    assert usual.messages_bytes == pytest.approx(4 * 3 * 2 * PARAMETERS_17B * 7 / 8, rel=0.05)
    assert usual.step_s == max(usual.compute_s, usual.messages_s) + usual.update_s
    assert usual.checkpoint_s == pytest.approx(106, abs=1)  # 212 GB at 2 GB/s
    assert usual.epoch_s(3200) == pytest.approx(100 * usual.step_s + usual.checkpoint_s)
    two_nodes = planner_17b.changed(cluster=Cluster(2, 8))
    assert step_of(two_nodes, network_gb_s=1).messages_s > 50 * step_of(two_nodes, network_gb_s=1000).messages_s
    assert step_of(planner_17b, network_gb_s=1).messages_s == usual.messages_s, "one node needs no network"


def test_a_batch_that_does_not_divide_is_a_mistake(planner_17b: Planner) -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch_size: 32 is not a multiple of 12 ranks"):
        step_of(planner_17b.changed(cluster=Cluster(1, 12)))


@pytest.fixture
def small_config(tmp_path: Path) -> str:
    SMALL.save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


@pytest.mark.slow
def test_the_program_prints_text_and_json(small_config: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model-config", small_config, "--gpus-per-node", "2", "--gpu-memory-gib", "1.52"]
    arguments += ["--images", "1000", "evaluate.batch_size=1", "data.max_turns_per_image=3"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pass"]["turns"] == 3 and found["verdict"]["status"] in ("fits", "tight")
    assert found["gpu_bytes"]["persistent"]["Adam"] == 2 * found["gpu_bytes"]["persistent"]["gradients"]
    assert found["epoch_s"] > 0 and found["num_images"] == 1000
    assert main([*arguments, "data.max_sequence_length=100"]) == 0
    text = capsys.readouterr().out
    for expected in (
        small_config,
        "56 px",
        "keys and values",
        "an epoch: 1,000 images",
        "an evaluation: 500 images",
        "largest values that fit",
    ):
        assert expected in text
    assert "every image with these turns would be rejected: 199 tokens" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0"], "--nodes 0: expected more than 0"),
        (["--answer-tokens", "61"], "--answer-tokens 61: expected at most --turn-tokens, 60"),
        (["--model-config", "absent.json"], "--model-config absent.json: no such file"),
        (["train.lrr=1"], "train.lrr"),
        (["model.path=~/.", "model.image_size=500"], "model.image_size: image_size=500 is not a multiple"),
        (["model.image_size=500"], "model.image_size: image_size=500 is not a multiple of the patch size 14"),
    ],
)
def test_mistakes_are_reported(
    arguments: list[str],
    message: str,
    small_config: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(Path(small_config).parent))
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_tables_in_the_documents_are_those_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--table"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and line != HEAD]
    assert len(rows) == 3 * 12
    for name in ("performance.md", "performance_zh.md"):
        written = (Path(__file__).resolve().parents[3] / "docs" / name).read_text(encoding="utf-8")
        assert all(row in written for row in rows), name
