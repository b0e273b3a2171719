"""Invalid model folders: each error names what is wrong, where, and what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvlm_ft.errors import CheckpointError, ConfigError
from cogvlm_ft.model import CogVLMForCausalLM, load_model
from cogvlm_ft.model.loading import (
    INDEX_FILE,
    POSITION_TABLE,
    READ_ELEMENTS,
    SINGLE_FILE,
    load_config,
    load_weights,
    open_tensors,
    parameter_shapes,
    read_whole,
    save_weights,
)


@pytest.fixture
def sharded(tiny_model: CogVLMForCausalLM, tmp_path: Path) -> Path:
    """Several files and their index."""
    folder = tmp_path / "sharded"
    tiny_model.config.save_pretrained(folder)
    save_weights(folder, tiny_model.named_parameters(), torch.float32, max_file_bytes=100_000)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    return folder


def assert_same_weights(found: CogVLMForCausalLM, wanted: CogVLMForCausalLM) -> None:
    parameters = dict(found.named_parameters())
    for name, parameter in wanted.named_parameters():
        assert torch.equal(parameters[name], parameter), name


def test_files_of_limited_size_read_back(tiny_model: CogVLMForCausalLM, sharded: Path) -> None:
    assert_same_weights(load_model(sharded), tiny_model)
    largest = max(parameter.nbytes for parameter in tiny_model.parameters())
    assert all(path.stat().st_size < max(100_000, largest) + 10_000 for path in sharded.glob("*.safetensors"))


def test_parts_of_stored_tensors_are_those_of_the_whole(tmp_path: Path) -> None:
    """Rows that end inside a part, and a tensor of two parts."""
    wanted = {"wide": torch.randn(5, READ_ELEMENTS // 3), "deep": torch.randn(2, 3, 7), "flat": torch.randn(11)}
    for dtype in (torch.float32, torch.bfloat16):
        save_weights(tmp_path, wanted.items(), dtype)
        found = open_tensors(tmp_path)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            flat = tensor.to(dtype).flatten()
            assert found[name].shape == tensor.shape
            assert torch.equal(read_whole(found[name], torch.float32), tensor.to(dtype).float())
            for start, stop in ((0, 1), (3, 11), (len(flat) - 2, len(flat)), (5, 5), (0, len(flat))):
                assert torch.equal(found[name].read(start, stop), flat[start:stop]), (name, start, stop)


@pytest.mark.parametrize(
    ("content", "found"),
    [(b'{"a":' * 10**5, "nested too deeply"), (b"{", "Expecting property name"), (b"\xff", "can't decode byte 0xff")],
)
def test_a_config_that_cannot_be_read_is_one_clear_error(tmp_path: Path, content: bytes, found: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{found}.*; expected JSON .*Download it again"):
        load_config(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"no config\.json found"):
        load_config(tmp_path)


def test_one_error_lists_all_problems_of_all_files(tiny_model: CogVLMForCausalLM, sharded: Path) -> None:
    tensors = dict(tiny_model.named_parameters())
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1, "vocab_size": 7}))
    del tensors["model.norm.weight"]
    del tensors["model.vision.boi"]
    tensors["model.vision.eoi"] = torch.zeros(1, 1, 63)
    save_weights(sharded, tensors.items(), torch.float32, max_file_bytes=100_000)
    with pytest.raises(CheckpointError) as error:
        load_model(sharded)
    problems = str(error.value).splitlines()[1:]
    unexpected = [name for name in tensors if name.startswith("model.layers.1.")]
    wanted = {f"unexpected {name}" for name in unexpected}
    wanted |= {"missing model.norm.weight", "missing model.vision.boi"}
    wanted |= {f"{name} has shape" for name in ("model.vision.eoi", "model.embed_tokens.weight", "lm_head.weight")}
    assert len(problems) == len(wanted)
    for start in wanted:
        assert any(problem.strip().startswith(start) for problem in problems), start


def test_rotary_buffers_in_a_file_change_nothing(tiny_model: CogVLMForCausalLM, tmp_path: Path) -> None:
    """Published files contain them rounded to bfloat16."""
    tiny_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / SINGLE_FILE)
    for key in [key for key in weights if key.endswith("inv_freq")]:
        weights[key] = weights[key].bfloat16()
    save_file(weights, tmp_path / SINGLE_FILE, {"format": "pt"})
    loaded = load_model(tmp_path)
    for key, value in tiny_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_pickled_files_are_refused_and_the_way_to_convert_them_works(
    tiny_model: CogVLMForCausalLM, tmp_path: Path
) -> None:
    tiny_model.config.save_pretrained(tmp_path)
    parts: list[dict[str, torch.Tensor]] = [{}, {}]
    for number, (name, value) in enumerate(tiny_model.state_dict().items()):
        parts[number % 2][name] = value
    for number, part in enumerate(parts):
        torch.save(part, tmp_path / f"pytorch_model-0000{number + 1}-of-00002.bin")
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.bin, .*00002-of-00002\.bin.*weights_only=True.*save_"):
        load_model(tmp_path)

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(tmp_path.glob("*.bin")):
        tensors.update(torch.load(file, weights_only=True))
    save_file(tensors, tmp_path / SINGLE_FILE, {"format": "pt"})
    assert_same_weights(load_model(tmp_path), tiny_model)


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4984147224\n", b"", None]
)
def test_a_damaged_file_is_named_with_its_size(sharded: Path, content: bytes | None) -> None:
    file = sorted(sharded.glob("*.safetensors"))[1]
    content = file.read_bytes()[:-100] if content is None else content
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{file.name}: found {len(content)} bytes that .*Download it again"):
        load_model(sharded)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "no readable weight_map"),
        ('{"metadata": {}}', "no readable weight_map"),
        ("[]", "no readable weight_map"),
        ('{"weight_map": {"lm_head.weight": "model-9.safetensors"}}', r"found 'model-9\.safetensors'; expected a"),
        ('{"weight_map": {"lm_head.weight": "../model.safetensors"}}', r"found '\.\./model\.safetensors'; expected a"),
    ],
)
def test_a_damaged_index_is_named(sharded: Path, index: str, message: str) -> None:
    (sharded / INDEX_FILE).write_text(index)
    with pytest.raises(CheckpointError, match=message):
        load_model(sharded)


def test_a_position_table_that_is_no_square_is_a_wrong_shape(tiny_model: CogVLMForCausalLM, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / SINGLE_FILE)
    weights[POSITION_TABLE] = weights[POSITION_TABLE][:-1].clone()
    save_file(weights, tmp_path / SINGLE_FILE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"position_embedding\.weight has shape \[16, 48\]; expected \[17, 48\]"):
        load_model(tmp_path)


def test_an_image_size_must_be_a_multiple_of_the_patch_size(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.image_size: image_size=100 .*14"):
        load_model(tiny_folder, image_size=100)


def test_only_the_asked_rows_are_read(tiny_model: CogVLMForCausalLM, sharded: Path) -> None:
    """As a rank reads: any rows of any tensor, and each tensor is offered once."""
    wanted = dict(tiny_model.named_parameters())
    seen = []

    def assign(name: str, fetch: object, num_rows: int) -> None:
        seen.append(name)
        assert num_rows == len(wanted[name])
        middle = fetch(num_rows // 3, num_rows // 3 + 1)  # type: ignore[operator]
        assert torch.equal(middle, wanted[name][num_rows // 3 : num_rows // 3 + 1])

    load_weights(sharded, parameter_shapes(wanted.items()), assign)  # type: ignore[arg-type]
    assert sorted(seen) == sorted(wanted)


def test_sampling_values_in_a_config_json_do_not_stop_a_save(tiny_folder: Path, tmp_path: Path) -> None:
    """Vicuna's files set a temperature without sampling, which transformers refuses to save; answers are greedy."""
    values = json.loads((tiny_folder / "config.json").read_text(encoding="utf-8"))
    values |= {"temperature": 0.9, "top_p": 0.6, "do_sample": False, "torch_dtype": "bfloat16"}
    (tiny_folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    model = load_model(tiny_folder)
    model.config.save_pretrained(tmp_path)
    model.generation_config.save_pretrained(tmp_path)
    assert "temperature" not in json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8"))
