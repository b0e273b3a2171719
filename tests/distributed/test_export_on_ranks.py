"""Weights that two ranks trained under ZeRO-3, exported by the program, with verification and model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import REPOSITORY, run
from transformers import AutoModelForCausalLM

from cogvlm_ft.checkpoints.checkpoint import list_checkpoints
from cogvlm_ft.checkpoints.consolidate import open_weights
from cogvlm_ft.model.fingerprint import fingerprint
from cogvlm_ft.model.loading import read_whole

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("shared runs")]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_program_exports_and_verifies_what_ranks_trained(bf16_run: Path, tmp_path: Path, dtype: str) -> None:
    checkpoint, out = list_checkpoints(bf16_run / "checkpoints")[-1], tmp_path / "exported"
    output = run(["launch/export.py", "--checkpoint", checkpoint, "--out", out, "--dtype", dtype], 1, tmp_path / "logs")
    assert "verified: " in output and f"--model {out}" in output
    weights = open_weights(checkpoint)
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    proof = json.loads((out / "proof.json").read_text())
    assert (proof["problems"], proof["dtype"]) == ([], str(torch_dtype).removeprefix("torch."))
    assert proof["num_tensors"] > len(weights)  # and the rotary buffers
    parameters = dict(AutoModelForCausalLM.from_pretrained(out).named_parameters())
    assert parameters.keys() == weights.keys()
    for name, parameter in parameters.items():
        assert torch.equal(parameter.data, read_whole(weights[name], torch_dtype)), name


def test_the_card_tells_of_the_run(bf16_run: Path, tmp_path: Path) -> None:
    checkpoint, out = list_checkpoints(bf16_run / "checkpoints")[-1], tmp_path / "exported"
    run(["launch/export.py", "--checkpoint", checkpoint, "--out", out], 1, tmp_path / "logs")
    card = (out / "README.md").read_text(encoding="utf-8")
    state = json.loads((checkpoint / "state.json").read_text())
    metrics = json.loads((bf16_run / "evaluations" / checkpoint.name / "metrics.json").read_text())
    assert state["data_sha256"] in card and fingerprint(out) in card
    assert f"| `mean_iou` | {metrics['mean_iou']:.4g} |" in card
    assert "| precision of training; of these weights | bf16; float32 |" in card
    assert "| samples in an epoch | 33 (split train) |" in card
    assert str(tmp_path.parent) not in card and str(REPOSITORY) not in card


def test_a_run_that_was_moved_away_from_its_shards(bf16_run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(bf16_run / "checkpoints", moved / "checkpoints")
    checkpoint = list_checkpoints(moved / "checkpoints")[-1]
    output = run(["launch/export.py", "--checkpoint", checkpoint, "--out", tmp_path / "out"], 1, tmp_path / "logs")
    assert "verified: " in output
    assert json.loads((tmp_path / "out" / "proof.json").read_text())["problems"] == []
