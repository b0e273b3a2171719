"""Turns that share an image prefix, on two ranks, train as turns in sequences of their own in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import read_metrics, run
from tiny import run_settings

from cogvlm_ft.checkpoints.checkpoint import list_checkpoints
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.look import turns_of
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.export.export import export_checkpoint
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model import load_model

pytestmark = pytest.mark.slow
NUM_STEPS = 2


def train(
    shards: Path, start_model: Path, folder: Path, num_sequences: int, num_ranks: int, *settings: str
) -> list[dict]:
    """Train with the whole split in every step, so that both ways see the same in each; 1 rank accumulates."""
    half = -(-num_sequences // 2)
    changes = [f"train.global_batch_size={2 * half}", f"train.micro_batch_size={half}"]
    changes += [f"train.epochs={NUM_STEPS}", "evaluate.before_training=false", f"evaluate.every_epochs={NUM_STEPS}"]
    changes += ["evaluate.max_samples=2", "evaluate.max_new_tokens=2", *settings]
    changes += ["train.box_loss.weight=1.0", "train.digit_weights=[4,2,1]"]  # exact too
    arguments = run_settings(shards, start_model, folder / "run", *changes)
    run(["launch/train.py", *arguments], num_ranks, folder / "logs")
    export_checkpoint(list_checkpoints(folder / "run" / "checkpoints")[-1], folder / "exported", torch.float32)
    return read_metrics(folder / "run", "train")


def test_together_as_apart(shards: Path, start_model: Path, tmp_path: Path) -> None:
    reader = ShardReader(load_index(shards, "train"))
    wording = load_wording("box")
    turns = [len(turns_of(reader.read(i).record, wording, seed=0, epoch=0)) for i in range(len(reader))]
    assert max(turns) > 3
    together = train(shards, start_model, tmp_path / "together", len(turns), 2)
    apart = train(shards, start_model, tmp_path / "apart", sum(turns), 1, "data.max_turns_per_image=1")
    assert len(together) == len(apart) == NUM_STEPS
    for name in ("loss", "cross_entropy", "grad_norm"):
        assert [row[name] for row in together] == pytest.approx([row[name] for row in apart], rel=1e-5)
    expected = dict(load_model(tmp_path / "apart" / "exported").named_parameters())
    for name, parameter in load_model(tmp_path / "together" / "exported").named_parameters():
        torch.testing.assert_close(parameter.data, expected[name].data, atol=1e-5, rtol=0, msg=lambda m, n=name: n + m)
