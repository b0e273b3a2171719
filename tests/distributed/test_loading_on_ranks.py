"""Model folders under ZeRO-3: every rank reads its slices, at any image size; a folder that does not fit stops all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import read_metrics, run, started
from safetensors.torch import load_file, save_file
from tiny import short_run_settings

from cogvlm_ft.checkpoints.checkpoint import list_checkpoints
from cogvlm_ft.export.export import export_checkpoint
from cogvlm_ft.model import load_config, load_model
from cogvlm_ft.model.loading import POSITION_TABLE, SINGLE_FILE, interpolate_position_embedding

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("loading_rules.py")


def test_ranks_read_one_checkpoint_between_them(start_model: Path, tmp_path: Path) -> None:
    """Load at another image size, in bf16 and into host memory; zero3_rules.py loads without these."""
    settings = ["model.image_size=112", "train.precision=bf16", "deepspeed=configs/deepspeed/zero3_offload_all.json"]
    output = run([PROGRAM, start_model, *settings], 2, tmp_path)
    read = [json.loads(line)["bytes_read"] for line in output.splitlines() if line.startswith('{"rank"')]
    total = sum(parameter.nbytes for parameter in load_model(start_model, 112).parameters())
    assert total <= sum(read) < 1.05 * total  # a row that two ranks share is read twice
    assert max(read) < 0.55 * total


def test_training_at_a_raised_resolution(shards: Path, start_model: Path, tmp_path: Path) -> None:
    """Train the interpolated table; the exported folder has the new size in its config."""
    out = tmp_path / "run"
    frozen = "model.freeze=[model.vision.*]"
    settings = short_run_settings(shards, start_model, out, "model.image_size=112", frozen)
    run(["launch/train.py", *settings], 2, tmp_path / "logs")
    assert [row["step"] for row in read_metrics(out, "train")] == [1, 2]
    export_checkpoint(list_checkpoints(out / "checkpoints")[-1], tmp_path / "exported", torch.float32)
    assert load_config(tmp_path / "exported").image_size == 112
    exported = load_model(tmp_path / "exported")
    before = load_file(start_model / SINGLE_FILE)[POSITION_TABLE]
    table = exported.model.vision.patch_embedding.position_embedding.weight
    assert torch.equal(table, interpolate_position_embedding(before, 65))
    pixels = torch.zeros(1, 3, 112, 112)
    ids = torch.tensor([[1] + [0] * (64 + 2) + [5, 6]])
    assert torch.isfinite(exported(input_ids=ids, pixel_values=pixels).logits).all()


def test_a_folder_that_does_not_fit_stops_every_rank(shards: Path, start_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(start_model, broken)
    weights = load_file(broken / SINGLE_FILE)
    del weights["model.norm.weight"]
    weights["model.extra"] = torch.zeros(1)
    weights["lm_head.weight"] = weights["lm_head.weight"][:-1].clone()
    save_file(weights, broken / SINGLE_FILE)
    settings = short_run_settings(shards, broken, tmp_path / "run")
    with started(["launch/train.py", *settings], 2, tmp_path / "logs") as ranks:
        assert ranks.wait() == [2, 2], ranks.output()
        for log in ranks.logs:
            text = log.read_text()
            assert "Traceback" not in text
            for problem in ("missing model.norm.weight", "unexpected model.extra", "lm_head.weight has shape"):
                assert problem in text, log
