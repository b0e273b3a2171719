"""An export is what its checkpoint is, and says so only if it is; what goes wrong is told and leaves nothing behind."""

from __future__ import annotations

import itertools
import json
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_folder import write_run
from safetensors.torch import load_file, save_file
from taught_model import lessons, teach
from torch import Tensor
from transformers import AutoModelForCausalLM

from cogvlm_ft.checkpoints.checkpoint import MODEL_FOLDER
from cogvlm_ft.config import load_config as load_settings
from cogvlm_ft.data.collate import Example, collate
from cogvlm_ft.data.encode import encode_turns
from cogvlm_ft.data.plan import Item
from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.export.export import check_room, checkpoint_contents, export_checkpoint, rejected_path
from cogvlm_ft.export.proof_samples import ProofSamples, read_samples
from cogvlm_ft.export.verification import compare_answers, compare_tensors, prove_export
from cogvlm_ft.launch.export import main
from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer, load_config, load_model
from cogvlm_ft.model.loading import (
    INDEX_FILE,
    POSITION_TABLE,
    SINGLE_FILE,
    interpolate_position_embedding,
    save_weights,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_SAMPLES = 4


@pytest.fixture
def model(start_model: Path) -> CogVLMForCausalLM:
    return load_model(start_model)


@pytest.fixture
def checkpoint(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, shards: Path, tmp_path: Path) -> Path:
    return write_checkpoint(model, tokenizer, shards, tmp_path / "run")


def write_checkpoint(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, shards: Path, run: Path) -> Path:
    settings = {"output_dir": run, "model.path": "models/start", "data.shards": shards, "data.wording": "mixed"}
    return write_run(run, model.config, tokenizer, model.named_parameters(), settings)


@pytest.fixture
def samples(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, shards: Path) -> ProofSamples:
    settings = load_settings(None, ["output_dir=run", "model.path=model", f"data.shards={shards}"])
    return read_samples(settings, model.config, tokenizer, NUM_SAMPLES)


def export(checkpoint: Path, out: Path, *more: object) -> int:
    return main([str(value) for value in ("--checkpoint", checkpoint, "--out", out, *more)])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_export_holds_the_weights_and_proves_it(
    checkpoint: Path, model: CogVLMForCausalLM, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "exported"
    assert export(checkpoint, out, "--dtype", dtype, "--prove", NUM_SAMPLES) == 0
    assert names(out.parent) == ["exported"]
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert plain.dtype == DTYPES[dtype]
    found, wanted = load_file(out / SINGLE_FILE), model.state_dict()
    assert found.keys() == wanted.keys() == plain.state_dict().keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value.to(DTYPES[dtype])), name
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.data, found[name]), name

    proof = json.loads((out / "proof.json").read_text())
    likeness = proof["likeness"]
    assert (proof["problems"], proof["num_samples"], proof["samples"]) == ([], NUM_SAMPLES, "val")
    assert (proof["dtype"], proof["num_tensors"]) == (f"{'float32' if dtype == 'fp32' else 'bfloat16'}", len(wanted))
    assert likeness["num_tokens"] > 100
    if dtype == "fp32":
        assert (likeness["num_unequal"], likeness["largest_difference"], likeness["equal_tokens"]) == (0, 0.0, 1.0)
    else:
        assert likeness["num_unequal"] == likeness["num_tokens"]
        assert 1e-4 < likeness["largest_difference"] / likeness["spread"] < 0.1
        assert 0.9 < likeness["equal_tokens"] <= 1.0
    assert "proven" in capsys.readouterr().out


def test_what_bf16_loses_is_what_two_whole_models_show(
    checkpoint: Path, model: CogVLMForCausalLM, samples: ProofSamples, tmp_path: Path
) -> None:
    export_checkpoint(checkpoint, tmp_path / "exported", torch.bfloat16)
    exported = load_file(tmp_path / "exported" / SINGLE_FILE)
    likeness = compare_answers(
        tmp_path / "exported", checkpoint / MODEL_FOLDER, checkpoint_contents(checkpoint), exported, samples
    )
    [batch] = samples.batches
    inputs = {name: getattr(batch, name) for name in ("input_ids", "pixel_values", "position_ids", "block_ids")}
    is_labelled = batch.labels[:, 1:] != -100
    with torch.no_grad():
        wholes = (model, load_model(tmp_path / "exported"))
        here, there = (whole(**inputs).logits[:, :-1][is_labelled] for whole in wholes)
    assert likeness.num_tokens == len(here) == batch.num_target_tokens
    assert likeness.largest_difference == pytest.approx((here - there).abs().max().item(), rel=1e-3)
    assert likeness.spread == pytest.approx(here.std(dim=1).mean().item(), rel=1e-4)
    assert likeness.equal_tokens == (here.argmax(1) == there.argmax(1)).float().mean().item()


@pytest.mark.slow
def test_boxes_of_answers_are_compared(tokenizer: CogVLMTokenizer, tmp_path: Path) -> None:
    """A model that knows its answers by heart, and the same with two digits exchanged in its last layer."""
    folder = teach(tokenizer, tmp_path / "taught")
    config, weights = load_config(folder), load_file(folder / SINGLE_FILE)
    turns = lessons()
    sequences = encode_turns(turns, tokenizer, config)
    size = config.image_size
    example = Example("lessons", Item(0, 0, 1.0), torch.zeros(3, size, size), sequences, 1.0, len(turns))
    samples = ProofSamples([collate([example])], "lessons")
    same = compare_answers(folder, folder, weights, weights, samples)
    num_with_boxes = sum("[[" in turn.answer for turn in turns)
    assert (same.num_with_boxes, same.equal_boxes, same.equal_tokens) == (num_with_boxes, 1.0, 1.0)

    head = weights["lm_head.weight"].clone()
    pair = [tokenizer.encode("6")[-1], tokenizer.encode("7")[-1]]
    head[pair] = head[pair[::-1]]
    other = compare_answers(folder, folder, weights, {**weights, "lm_head.weight": head}, samples)
    num_touched = sum("[[" in turn.answer and "6" in turn.answer for turn in turns)
    assert other.num_with_boxes == num_with_boxes > num_touched > 0
    assert other.equal_boxes == pytest.approx(1 - num_touched / num_with_boxes)
    assert other.equal_tokens < 1


def test_a_flipped_bit_anywhere_in_the_weights_is_found(
    checkpoint: Path, samples: ProofSamples, tmp_path: Path
) -> None:
    out = tmp_path / "exported"
    export_checkpoint(checkpoint, out, torch.float32)
    contents = checkpoint_contents(checkpoint)
    assert prove_export(out, checkpoint / MODEL_FOLDER, contents, torch.float32, samples).problems == []
    file = out / SINGLE_FILE
    good = file.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    rng = random.Random(0)
    places = [start, len(good) - 1, *(rng.randrange(start, len(good)) for _ in range(30))]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        proof = prove_export(out, checkpoint / MODEL_FOLDER, contents, torch.float32, samples)
        assert [problem.partition(": ")[2].partition(" of ")[0] for problem in proof.problems] == ["1"], place
        assert "is not what its checkpoint is" in proof.summary()


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


@pytest.mark.parametrize(
    "damage",
    [
        *(cut_short, lose_a_file, lose_the_index, lose_a_tensor, exchange_two_tensors, change_the_dtype),
        *(change_the_config, break_the_config, change_the_tokenizer),
    ],
)
def test_other_damage_is_named(
    checkpoint: Path, samples: ProofSamples, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    folder = tmp_path / "exported"
    shutil.copytree(checkpoint / MODEL_FOLDER, folder)
    contents = checkpoint_contents(checkpoint)
    save_weights(folder, contents.items(), torch.float32, max_file_bytes=100_000)
    assert prove_export(folder, checkpoint / MODEL_FOLDER, contents, torch.float32, samples).problems == []
    named = damage(folder)
    proof = prove_export(folder, checkpoint / MODEL_FOLDER, contents, torch.float32, samples)
    assert named in "\n".join(proof.problems)
    assert proof.likeness is None


def test_weights_of_another_checkpoint_are_found_in_bf16(
    checkpoint: Path, model: CogVLMForCausalLM, tmp_path: Path
) -> None:
    """A rounding less or more is enough."""
    export_checkpoint(checkpoint, tmp_path / "exported", torch.bfloat16)
    contents = checkpoint_contents(checkpoint)
    assert compare_tensors(tmp_path / "exported", contents, torch.bfloat16) == []
    norm = model.model.norm.weight.data.clone()
    norm[3] *= 1 + 2**-7
    changed = {**contents, "model.norm.weight": norm}
    assert compare_tensors(tmp_path / "exported", changed, torch.bfloat16) == [
        "model.norm.weight: 1 of 60 elements differ"
    ]


def test_equal_weights_with_other_logits_are_no_proof(
    checkpoint: Path, samples: ProofSamples, tmp_path: Path, model: CogVLMForCausalLM
) -> None:
    """The smallest difference of one weight shows in the logits of fp32."""
    contents = checkpoint_contents(checkpoint)
    head = model.lm_head.weight.data.clone()
    head[7, 7] = torch.nextafter(head[7, 7], torch.tensor(10.0))
    changed: dict[str, Tensor] = {**contents, "lm_head.weight": head}
    files = checkpoint / MODEL_FOLDER
    assert compare_answers(files, files, contents, contents, samples).num_unequal == 0
    assert compare_answers(files, files, contents, changed, samples).num_unequal > 0


def test_an_export_that_is_not_proven_is_kept_under_another_name(
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
        assert export(checkpoint, out, "--prove", 1) == 1
        assert names(tmp_path) == [rejected_path(out).name, "run"]
        error = capsys.readouterr().err
        assert "not finite" in error and str(rejected_path(out)) in error
        assert json.loads((rejected_path(out) / "proof.json").read_text())["problems"]


def test_without_the_shards_pictures_are_made(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = checkpoint.parents[1] / "config.yaml"
    settings.write_text(settings.read_text().replace("shards:", "shards: nowhere/"))
    assert export(checkpoint, tmp_path / "first", "--prove", 3) == 0
    assert "nowhere/" in caplog.text and "made pictures" in caplog.text
    settings.unlink()
    assert export(checkpoint, tmp_path / "second", "--prove", 3) == 0
    for out in (tmp_path / "first", tmp_path / "second"):
        proof = json.loads((out / "proof.json").read_text())
        assert (proof["samples"], proof["num_samples"], proof["problems"]) == ("made pictures", 3, [])


def test_more_samples_than_one_batch(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint.parents[1] / "config.yaml").unlink()
    assert export(checkpoint, tmp_path / "exported", "--prove", 12) == 0
    proof = json.loads((tmp_path / "exported" / "proof.json").read_text())
    assert (proof["num_samples"], proof["likeness"]["num_unequal"]) == (12, 0)


def test_another_image_size_goes_with_the_export(
    start_model: Path, tokenizer: CogVLMTokenizer, shards: Path, tmp_path: Path
) -> None:
    model = load_model(start_model, 112)
    checkpoint = write_checkpoint(model, tokenizer, shards, tmp_path / "run")
    assert export(checkpoint, tmp_path / "exported", "--prove", 2) == 0
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
        assert export(checkpoint, tmp_path / "exported", "--prove", 1) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["run"]
    assert "no room" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"GiB are free there, the weights take 4096\.0 GiB"):
        check_room(tmp_path / "exported", {"huge": torch.empty(2**40, device="meta")}, torch.float32)


@pytest.mark.parametrize("kind", ["missing", "damaged", "exists", "no folder can be made"])
def test_mistakes_are_told(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    out, wanted = tmp_path / "exported", "step-00000007"
    if kind == "missing":
        checkpoint = checkpoint.with_name("step-00000008")
    elif kind == "damaged":
        path = next((checkpoint / "ranks").iterdir())
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        wanted = "sha256 differs"
    elif kind == "exists":
        out.mkdir()
        wanted = f"{out} exists"
    else:
        (tmp_path / "file").touch()
        out = wanted = tmp_path / "file" / "exported"
    before = names(tmp_path)
    assert export(checkpoint, out, "--prove", 1) == 2
    assert str(wanted) in capsys.readouterr().err
    assert names(tmp_path) == before


def test_what_a_killed_export_left_is_replaced(checkpoint: Path, tmp_path: Path) -> None:
    leftover = tmp_path / ".tmp-exported"
    leftover.mkdir()
    (leftover / "model-00001-of-00002.safetensors").write_bytes(b"half")
    assert export(checkpoint, tmp_path / "exported", "--prove", 0) == 0
    assert names(tmp_path) == ["exported", "run"]
    assert not {"model-00001-of-00002.safetensors", "proof.json"} & set(names(tmp_path / "exported"))
