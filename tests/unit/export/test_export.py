"""An export equals its checkpoint and is only published if it does; failures are reported and leave nothing behind."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_folder import write_run
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForCausalLM

from cogvlm_ft.checkpoints.checkpoint import MODEL_FOLDER, read_state, record_evaluation
from cogvlm_ft.checkpoints.choice import chosen_boxes
from cogvlm_ft.checkpoints.model_folder import open_contents
from cogvlm_ft.errors import CheckpointError, ConfigError
from cogvlm_ft.export.blend import pair_with_start
from cogvlm_ft.export.blend_scores import PROBE, BlendScore, best_blend, held, set_blend
from cogvlm_ft.export.export import check_free_space, export_checkpoint, rejected_path
from cogvlm_ft.export.quantized import export_quantized
from cogvlm_ft.export.verification import Verification, compare_tensors, verify_export
from cogvlm_ft.grounding.confidence import KeptBoxes
from cogvlm_ft.launch.export import main
from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer, load_config, load_model, preprocess_image
from cogvlm_ft.model.loading import (
    INDEX_FILE,
    POSITION_TABLE,
    SINGLE_FILE,
    interpolate_position_embedding,
    save_weights,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture
def model(start_model: Path) -> CogVLMForCausalLM:
    return load_model(start_model)


@pytest.fixture
def checkpoint(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, shards: Path, tmp_path: Path) -> Path:
    return write_checkpoint(model, tokenizer, shards, tmp_path / "run")


def write_checkpoint(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, shards: Path, run: Path) -> Path:
    settings = {"output_dir": run, "model.path": "models/start", "data.shards": shards, "data.wording": "mixed"}
    return write_run(run, model.config, tokenizer, model.named_parameters(), settings)


def export(checkpoint: Path, out: Path, *more: object) -> int:
    return main([str(value) for value in ("--checkpoint", checkpoint, "--out", out, *more)])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_export_holds_the_weights_and_is_verified(
    checkpoint: Path, model: CogVLMForCausalLM, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "exported"
    record_evaluation(checkpoint.parent, dataclasses.replace(read_state(checkpoint), kept_boxes=KeptBoxes(0.25, True)))
    assert export(checkpoint, out, "--dtype", dtype) == 0
    assert names(out.parent) == ["exported"] and chosen_boxes(out) == chosen_boxes(checkpoint) == KeptBoxes(0.25, True)
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert plain.dtype == DTYPES[dtype]
    found, expected = load_file(out / SINGLE_FILE), model.state_dict()
    assert found.keys() == expected.keys() == plain.state_dict().keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value.to(DTYPES[dtype])), name
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.data, found[name]), name

    served = json.loads((out / "config.json").read_text())
    assert served["num_key_value_heads"] == served["num_attention_heads"] == model.config.num_attention_heads
    assert "auto_map" not in served  # it names .py files, and this folder has none
    processor = AutoImageProcessor.from_pretrained(out, use_fast=False)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    pixels = processor(photo, return_tensors="pt").pixel_values[0]
    assert torch.allclose(pixels, preprocess_image(photo, model.config.image_size), atol=1e-5)

    proof = json.loads((out / "proof.json").read_text())
    torch_name = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    assert proof == {"dtype": torch_name, "num_tensors": len(expected), "problems": []}
    assert f"verified: {len(expected)} tensors equal those of the checkpoint bit for bit in {torch_name}" in (
        capsys.readouterr().out
    )


def test_the_choice_of_boxes_from_tiles_is_that_of_the_exported_weights(
    checkpoint: Path, start_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The averages have one of their own, a blend has none; it is kept where the weights are quantised."""
    kept, step = KeptBoxes(0.25, True), read_state(checkpoint).step
    state = dataclasses.replace(read_state(checkpoint), kept_boxes=kept, evaluated_step=step)
    record_evaluation(checkpoint.parent, state)
    assert chosen_boxes(checkpoint) == kept and not caplog.messages
    assert chosen_boxes(checkpoint, averaged=True) is None and "for the averaged weights" in caplog.messages[-1]
    record_evaluation(checkpoint.parent, dataclasses.replace(state, averaged_kept_boxes=KeptBoxes(0.5)))
    assert chosen_boxes(checkpoint, averaged=True) == KeptBoxes(0.5) and chosen_boxes(checkpoint) == kept
    export_quantized(checkpoint, tmp_path / "int8", "int8")
    assert chosen_boxes(tmp_path / "int8") == kept
    assert export(checkpoint, tmp_path / "blended", "--blend", 0.6, "--start", start_model) == 0
    assert chosen_boxes(tmp_path / "blended") is None and "--blend: no evaluation chose" in caplog.messages[-1]
    record_evaluation(checkpoint.parent, dataclasses.replace(state, evaluated_step=step - 1))
    assert chosen_boxes(checkpoint) == kept and f"none has chosen it for step {step}" in caplog.messages[-1]


def test_a_blend_is_between_the_start_and_the_checkpoint(
    checkpoint: Path, model: CogVLMForCausalLM, start_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is verified as such, and its card quotes no scores of the checkpoint."""
    start = tmp_path / "before"
    shutil.copytree(start_model, start)
    before = {name: value + torch.randn_like(value) for name, value in model.named_parameters()}
    save_weights(start, before.items(), torch.bfloat16)
    rounded = {name: value.bfloat16().float() for name, value in before.items()}
    assert export(checkpoint, tmp_path / "blended", "--blend", 0.6, "--start", start) == 0
    found = load_file(tmp_path / "blended" / SINGLE_FILE)
    for name, tuned in model.named_parameters():
        torch.testing.assert_close(found[name], tuned.data * 0.6 + rounded[name] * 0.4, rtol=0, atol=1e-6)
    in_memory = load_model(start_model)
    set_blend(in_memory, held(pair_with_start(open_contents(checkpoint), start)), 0.6)
    assert all(torch.equal(found[name], values) for name, values in in_memory.named_parameters())
    card = (tmp_path / "blended" / "README.md").read_text()
    assert "0.6 x those of the checkpoint + 0.4 x those of the model `before`" in card and "mean_iou" not in card
    assert "equal those of the blend bit for bit" in card and "of the blend bit" in capsys.readouterr().out

    save_weights(start, [*before.items(), ("lm_head.other", torch.zeros(1))], torch.float32)
    for fraction, at, message in (
        (1.5, start, "--blend 1.5: expected"),
        (0.5, start, "lm_head.other"),
        (0.5, tmp_path, "--start"),
    ):
        assert export(checkpoint, tmp_path / "other", "--blend", fraction, "--start", at) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_the_best_blend_is_the_best_of_those_that_forget_little() -> None:
    found = [(0.0, 0.1, 80.0), (0.4, 0.5, 79.0), (0.8, 0.7, 60.0), (1.0, 0.6, 20.0)]
    scores = [BlendScore(f, {"mean_iou": iou, "unreadable": 1 - iou, PROBE: probe}) for f, iou, probe in found]
    for monitor in ("mean_iou", "unreadable", {"mean_iou": 1.0, "unreadable": 0.5}):
        chosen = [best_blend(scores, monitor, keep).fraction for keep in (0.0, 0.5, 0.98, 1.0)]
        assert chosen == [0.8, 0.8, 0.4, 0.0]
    with pytest.raises(ConfigError, match="found no value"):
        best_blend(scores, "chrf", 0.0)


def test_a_proof_of_a_former_version_is_read(tmp_path: Path) -> None:
    likeness = {"num_tokens": 9, "num_unequal": 0, "largest_difference": 0.0, "spread": 1.0, "equal_tokens": 1.0}
    former = {"dtype": "float32", "num_tensors": 3, "samples": "val", "num_samples": 2, "likeness": likeness}
    (tmp_path / "proof.json").write_text(json.dumps({**former, "problems": []}))
    assert Verification.load(tmp_path) == Verification("float32", 3, [])
    (tmp_path / "proof.json").write_text("{}")
    assert Verification.load(tmp_path) is None


def test_the_former_option_still_works(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where neither the shards nor the settings of the run are there: only weights are compared."""
    (checkpoint.parents[1] / "config.yaml").unlink()
    assert export(checkpoint, tmp_path / "exported", "--prove", 12) == 0
    printed = capsys.readouterr().out
    assert "answers are no longer compared" in printed and "verified: " in printed
    assert (tmp_path / "exported" / "proof.json").is_file()


@pytest.mark.slow
def test_a_flipped_bit_anywhere_in_the_weights_is_found(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    export_checkpoint(checkpoint, out, torch.float32)
    contents = open_contents(checkpoint)
    assert verify_export(out, checkpoint / MODEL_FOLDER, contents, torch.float32).problems == []
    file = out / SINGLE_FILE
    good = file.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    rng = random.Random(0)
    places = [start, len(good) - 1, *(rng.randrange(start, len(good)) for _ in range(30))]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        result = verify_export(out, checkpoint / MODEL_FOLDER, contents, torch.float32)
        assert [problem.partition(": ")[2].partition(" of ")[0] for problem in result.problems] == ["1"], place
        assert "differs from its checkpoint" in result.summary()


def cut_short(folder: Path) -> str:
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-1])
    return path.name


def lose_a_file(folder: Path) -> str:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.unlink()
    return path.name


def lose_the_index(folder: Path) -> str:
    (folder / INDEX_FILE).unlink()
    return INDEX_FILE


def lose_a_tensor(folder: Path) -> str:
    path = sorted(folder.glob("*.safetensors"))[-1]
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != name}, path, {"format": "pt"})
    return f"{name} is missing"


def exchange_two_tensors(folder: Path) -> str:
    """Of the same shape, so only their values tell."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for (first, a), (second, b) in itertools.combinations(tensors.items(), 2):
            if a.shape == b.shape and not torch.equal(a, b):
                save_file({**tensors, first: b, second: a}, path, {"format": "pt"})
                return first
    raise AssertionError("no two tensors of the same shape in one file")


def change_the_dtype(folder: Path) -> str:
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    save_file({key: value.half() for key, value in tensors.items()}, path, {"format": "pt"})
    return next(iter(tensors))


def change_the_config(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    return "rms_norm_eps"


def break_the_config(folder: Path) -> str:
    path = folder / "config.json"
    path.write_bytes(path.read_bytes()[:-9])
    return "config.json or tokenizer.model cannot be read"


def change_the_tokenizer(folder: Path) -> str:
    path = folder / "tokenizer.model"
    path.write_bytes(path.read_bytes() + b"\0")
    return "tokenizer.model differs"


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        *(cut_short, lose_a_file, lose_the_index, lose_a_tensor, exchange_two_tensors, change_the_dtype),
        *(change_the_config, break_the_config, change_the_tokenizer),
    ],
)
def test_other_damage_is_named(checkpoint: Path, tmp_path: Path, damage: Callable[[Path], str]) -> None:
    folder = tmp_path / "exported"
    shutil.copytree(checkpoint / MODEL_FOLDER, folder)
    contents = open_contents(checkpoint)
    save_weights(folder, contents.items(), torch.float32, max_file_bytes=100_000)
    assert verify_export(folder, checkpoint / MODEL_FOLDER, contents, torch.float32).problems == []
    named = damage(folder)
    result = verify_export(folder, checkpoint / MODEL_FOLDER, contents, torch.float32)
    assert named in "\n".join(result.problems)


def test_weights_of_another_checkpoint_are_found_in_bf16(
    checkpoint: Path, model: CogVLMForCausalLM, tmp_path: Path
) -> None:
    """A rounding less or more is enough."""
    export_checkpoint(checkpoint, tmp_path / "exported", torch.bfloat16)
    contents = open_contents(checkpoint)
    assert compare_tensors(tmp_path / "exported", contents, torch.bfloat16) == []
    norm = model.model.norm.weight.data.clone()
    norm[3] *= 1 + 2**-7
    changed = {**contents, "model.norm.weight": norm}
    assert compare_tensors(tmp_path / "exported", changed, torch.bfloat16) == [
        "model.norm.weight: 1 of 60 elements differ"
    ]


def test_an_export_that_is_rejected_is_kept_under_another_name(
    model: CogVLMForCausalLM,
    tokenizer: CogVLMTokenizer,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model.model.norm.weight.data[0] = float("nan")
    checkpoint = write_checkpoint(model, tokenizer, shards, tmp_path / "run")
    out = tmp_path / "exported"
    for _ in range(2):  # the second one takes the place of the first
        assert export(checkpoint, out) == 1
        assert names(tmp_path) == [rejected_path(out).name, "run"]
        error = capsys.readouterr().err
        assert "not finite" in error and str(rejected_path(out)) in error
        assert json.loads((rejected_path(out) / "proof.json").read_text())["problems"]


def test_another_image_size_goes_with_the_export(
    start_model: Path, tokenizer: CogVLMTokenizer, shards: Path, tmp_path: Path
) -> None:
    model = load_model(start_model, 112)
    checkpoint = write_checkpoint(model, tokenizer, shards, tmp_path / "run")
    assert export(checkpoint, tmp_path / "exported") == 0
    assert load_config(tmp_path / "exported").image_size == 112
    table = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").get_parameter(POSITION_TABLE)
    before = load_file(start_model / SINGLE_FILE)[POSITION_TABLE]
    assert torch.equal(table, interpolate_position_embedding(before, 65))


def test_a_disk_without_room_leaves_nothing_behind(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # the weights are larger
    try:
        assert export(checkpoint, tmp_path / "exported") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["run"]
    assert "no space left" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"GiB free on this disk; expected 4096\.0 GiB"):
        check_free_space(tmp_path / "exported", {"huge": torch.empty(2**40, device="meta")}, torch.float32)


@pytest.mark.parametrize("kind", ["missing", "damaged", "exists", "no folder can be made"])
def test_mistakes_are_reported(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    out, expected = tmp_path / "exported", "step-00000007"
    if kind == "missing":
        checkpoint = checkpoint.with_name("step-00000008")
    elif kind == "damaged":
        path = next((checkpoint / "ranks").iterdir())
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        expected = "sha256 differs"
    elif kind == "exists":
        out.mkdir()
        expected = f"{out} exists"
    else:
        (tmp_path / "file").touch()
        out = expected = tmp_path / "file" / "exported"
    before = names(tmp_path)
    assert export(checkpoint, out) == 2
    assert str(expected) in capsys.readouterr().err
    assert names(tmp_path) == before


def test_what_a_killed_export_left_is_replaced(checkpoint: Path, tmp_path: Path) -> None:
    leftover = tmp_path / ".tmp-exported"
    leftover.mkdir()
    (leftover / "model-00001-of-00002.safetensors").write_bytes(b"half")
    assert export(checkpoint, tmp_path / "exported", "--prove", 0) == 0
    assert names(tmp_path) == ["exported", "run"]
    assert not {"model-00001-of-00002.safetensors", "proof.json"} & set(names(tmp_path / "exported"))
