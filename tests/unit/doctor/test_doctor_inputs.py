"""The doctor on what a training reads, each on a real thing that is really broken."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from examining import Examine
from safetensors.torch import load_file, save_file

from cogvlm_ft.doctor.checks import CHECKS, ENGINE, LINKS, MODEL, MONITOR, PLAN, SHARDS, WORDING
from cogvlm_ft.model.tokenizer import train_tokenizer


def test_a_tokenizer_of_another_size(run_checks: Examine, model: Path) -> None:
    train_tokenizer(["Where is the red circle?", "[[086,540,400,760]]"], model / "tokenizer.model", vocab_size=300)
    num_red, said = run_checks([MODEL], f"model.path={model}")
    assert num_red == 1 and "vocab_size" not in said and "pieces, config.json has 400" in said
    assert "Vicuna's tokenizer.model" in said


def test_a_missing_tensor(run_checks: Examine, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    num_red, said = run_checks([MODEL], f"model.path={model}")
    assert num_red == 1 and "missing lm_head.weight [400, 60]" in said


def test_weights_that_are_cut_off(run_checks: Examine, model: Path) -> None:
    os.truncate(model / "model.safetensors", 100_000)
    num_red, said = run_checks([MODEL], f"model.path={model}")
    assert num_red == 1 and "found 100000 bytes that are not a complete safetensors file" in said


def test_no_model_at_all(run_checks: Examine, tmp_path: Path) -> None:
    """Checks that need the model's sizes report that; all others still run."""
    num_red, said = run_checks(list(CHECKS), f"model.path={tmp_path}")
    assert num_red == 1 and "expected a model folder" in said and "yellow  plan: cannot be estimated" in said
    assert "33 at random read and decoded" in said and "GB/s written" in said


def test_an_engine_preset_that_is_not_there(run_checks: Examine) -> None:
    num_red, said = run_checks([MODEL, PLAN, ENGINE], "deepspeed=nosuch.json")
    assert num_red == 1 and "red     engine: deepspeed=nosuch.json: no such file or preset" in said
    assert "green   model: " in said and "yellow  plan: cannot be estimated" in said


def test_a_monitor_that_cannot_be_measured(run_checks: Examine) -> None:
    num_red, said = run_checks([MONITOR], "train.monitor=acc@0.6")
    assert num_red == 1 and "found acc@0.6, but 9 validation images" in said
    num_red, said = run_checks([MONITOR])
    assert num_red == 0 and "green   monitor: train.monitor=mean_iou" in said


def test_a_broken_tokenizer(run_checks: Examine, model: Path) -> None:
    (model / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    num_red, said = run_checks([MODEL], f"model.path={model}")
    assert num_red == 1 and "tokenizer.model: found no model of SentencePiece" in said and "Traceback" not in said


def test_an_image_size_that_is_impossible(run_checks: Examine) -> None:
    num_red, said = run_checks([MODEL], "model.image_size=57")
    assert num_red == 1 and "model.image_size" in said and "multiple of the patch size 14" in said


def test_a_wording_or_a_probe_that_is_not_there(run_checks: Examine) -> None:
    assert run_checks([WORDING], "data.wording=nosuch")[0] == 1
    num_red, said = run_checks([WORDING], "evaluate.probe=nosuch.jsonl")
    assert num_red == 1 and "evaluate.probe=nosuch.jsonl: no such file" in said


def damage(folder: Path, split: str, part: str) -> str:
    """Overwrite the middle of the first sample's image or record; its key."""
    described = json.loads((folder / f"{split}-000000.json").read_text())
    sample = described["samples"][0]
    offset, size = sample[part]
    with (folder / f"{split}-000000.tar").open("r+b") as file:
        file.seek(offset + size // 3)
        file.write(b"\xff" * (size // 3))
    return sample["key"]


@pytest.mark.parametrize("part", ["image", "json"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_shard_with_flipped_bytes(run_checks: Examine, set_of_shards: Path, part: str, split: str) -> None:
    key = damage(set_of_shards, split, part)
    num_red, said = run_checks([SHARDS], f"data.shards={set_of_shards}", "data.max_bad_fraction=0")
    assert num_red == 1 and f"red     shards: {split}: " in said
    assert "1 cannot be used" in said and key in said and "data.max_bad_fraction=0" in said
    num_red, said = run_checks([SHARDS], f"data.shards={set_of_shards}")  # one in a small set
    assert num_red == 0 and f"yellow  shards: {split}: " in said


def test_bytes_that_no_sample_holds_are_found_by_their_hash(run_checks: Examine, set_of_shards: Path) -> None:
    with (set_of_shards / "train-000001.tar").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert run_checks([SHARDS], f"data.shards={set_of_shards}")[0] == 0
    num_red, said = run_checks([SHARDS], f"data.shards={set_of_shards}", all_shards=True)
    assert num_red == 1 and f"1 file differs from what was built: {set_of_shards / 'train-000001.tar'}" in said
    assert "33 samples, all read and decoded" in said


def test_samples_that_are_too_long_for_the_settings(run_checks: Examine) -> None:
    num_red, said = run_checks([SHARDS], "data.max_sequence_length=60")
    assert num_red == 1 and "too_long" in said


def test_photos_that_are_split_into_several_sequences(run_checks: Examine) -> None:
    num_red, said = run_checks([SHARDS], "data.max_turns_per_image=1", all_shards=True)
    assert num_red == 0 and "33 samples, all read and decoded" in said


def test_a_shard_that_is_gone(run_checks: Examine, set_of_shards: Path) -> None:
    (set_of_shards / "val-000000.tar").unlink()
    num_red, said = run_checks([SHARDS], f"data.shards={set_of_shards}")
    assert num_red == 1 and "missing shards: 1 of " in said


def test_a_plan_that_is_too_much_here(run_checks: Examine) -> None:
    """Alone, it may be meant for more machines: tests/distributed has the red line."""
    num_red, said = run_checks([PLAN], "train.micro_batch_size=100000", "train.global_batch_size=100000")
    assert num_red == 0 and "yellow  plan: too much for this machine alone" in said


def test_a_batch_that_does_not_divide(run_checks: Examine) -> None:
    num_red, said = run_checks([LINKS, ENGINE], "train.micro_batch_size=3")
    assert (
        num_red == 1 and "train.global_batch_size: 16 is not a multiple of 1 ranks x train.micro_batch_size=3" in said
    )
