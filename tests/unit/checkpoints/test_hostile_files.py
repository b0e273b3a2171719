"""Files from others whose hashes are right and whose contents are not: one line, no hang, no wrong weights."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folder import write_run
from safetensors.torch import load_file, save_file
from tiny import tiny_config

from cogvlm_ft.checkpoints.checkpoint import read_state
from cogvlm_ft.checkpoints.manifest import read_manifest, write_manifest
from cogvlm_ft.checkpoints.model_folder import open_contents
from cogvlm_ft.checkpoints.peft_files import open_peft_adapter
from cogvlm_ft.checkpoints.sat import FILE_NAME, open_sat
from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer, load_model
from cogvlm_ft.model.loading import open_tensors, read_whole
from cogvlm_ft.safetensors_io import FileRecord, hash_file

RANK, LAYOUT, CONFIG, ADAPTER = "ranks/rank-00000.safetensors", "layout.json", "model/config.json", "model/adapter.json"
FIRST = "weight/model.embed_tokens.weight"
RECORD = {"base": "/none", "base_sha256": "00", "rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["x"]}
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def original(tokenizer: CogVLMTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint whose run is beside a folder of the same model."""
    folder = tmp_path_factory.mktemp("hostile")
    torch.manual_seed(0)
    model = CogVLMForCausalLM(tiny_config(vocab_size=len(tokenizer)))
    model.save_pretrained(folder / "model")
    tokenizer.save(folder / "model")
    return write_run(folder / "run", model.config, tokenizer, list(model.named_parameters()), {"model.path": "x"})


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / original.name))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original.parents[2] / "model", tmp_path / "model"))


def read_all(checkpoint: Path) -> None:
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json"]
    write_manifest(checkpoint, {path.relative_to(checkpoint).as_posix(): hash_file(path) for path in files})
    for weight in open_contents(checkpoint).values():
        read_whole(weight, torch.float32)


def change_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": ["a"]},
        {"shape": []},
        {"shape": [-5]},
        {"shape": [10**15]},
        {"data_offsets": [-100, 50]},
        {"data_offsets": [0.5, 50]},
        {"data_offsets": [2**70, 2**70 + 8]},
        {"data_offsets": [0, 4]},
        {"data_offsets": None},
        {"dtype": "F16"},
    ],
)
def test_entries_of_a_header(entry: dict[str, Any], checkpoint: Path) -> None:
    change_header(checkpoint / RANK, lambda header: header[FIRST].update(entry))
    with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
        read_all(checkpoint)


@pytest.mark.parametrize("change", ["overlap", "deep", "dtype missing", "entry missing", "huge", "short"])
def test_headers(change: str, checkpoint: Path) -> None:
    path = checkpoint / RANK

    def overlap(header: dict[str, Any]) -> None:
        for name in header.keys() - {"__metadata__"}:
            header[name]["data_offsets"] = [0, 4 * header[name]["shape"][0]]

    if change == "huge":
        path.write_bytes(b"\xff" * 8 + b"{}")
    elif change == "short":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        changes: dict[str, Callable[[dict[str, Any]], object]] = {
            "overlap": overlap,
            "deep": lambda _: DEEP.encode(),
            "dtype missing": lambda header: header[FIRST].pop("dtype") and None,
            "entry missing": lambda header: header.pop(FIRST) and None,
        }
        change_header(path, changes[change])
    with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
        read_all(checkpoint)


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        (LAYOUT, {"world_size": 10**9}),
        (LAYOUT, {"world_size": -1}),
        (LAYOUT, {"world_size": 0}),
        (LAYOUT, {"world_size": "2"}),
        (LAYOUT, {"shapes": {"a": "bc"}}),
        (CONFIG, {"hidden_size": 10**9}),
        (CONFIG, {"hidden_size": "x"}),
        (CONFIG, {"num_hidden_layers": 10**7}),
        (CONFIG, {"num_attention_heads": 0}),
        (CONFIG, {"hidden_act": "none"}),
        (CONFIG, {"vision_config": [1]}),
        (ADAPTER, {**RECORD, "rank": 0}),
        (ADAPTER, {**RECORD, "alpha": None}),
        (ADAPTER, {**RECORD, "base": 7}),
        (ADAPTER, {**RECORD, "base_sha256": None}),
    ],
)
def test_values_of_json(file: str, fields: dict[str, Any], checkpoint: Path) -> None:
    path = checkpoint / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **fields}))
    with pytest.raises(CheckpointError):
        read_all(checkpoint)


@pytest.mark.parametrize(
    "fields", [{"step": "7"}, {"step": -1}, {"samples_consumed": 1.5}, {"best": {"value": "x", "step": 1}}, {"best": 7}]
)
def test_values_of_a_state(fields: dict[str, Any], checkpoint: Path) -> None:
    content = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**content, **fields}))
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        read_state(checkpoint)


@pytest.mark.parametrize("record", [FileRecord("x", 5), FileRecord(1, "x")])  # type: ignore[arg-type]
@pytest.mark.parametrize("name", ["state.json", "a\0b", "\ud800", "a" * 5000])
def test_names_and_records_of_a_manifest(name: str, record: FileRecord, checkpoint: Path) -> None:
    write_manifest(checkpoint, {name: record})
    with pytest.raises(CheckpointError, match="cannot be used"):
        open_contents(checkpoint)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_read(kind: str, checkpoint: Path) -> None:
    """A pipe would be waited for, and a device has no end; each has no bytes by its size."""
    files = read_manifest(checkpoint)
    (checkpoint / RANK).unlink()
    if kind == "pipe":
        os.mkfifo(checkpoint / RANK)
    elif kind == "device":
        (checkpoint / RANK).symlink_to("/dev/zero")
    else:
        (checkpoint / RANK).mkdir()
    size = (checkpoint / RANK).stat().st_size
    write_manifest(checkpoint, {**files, RANK: FileRecord(size, hashlib.sha256(b"").hexdigest())})
    with pytest.raises(CheckpointError, match="cannot be used"):
        open_contents(checkpoint)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_weights_of_another_type_are_not_taken_for_floats(dtype: torch.dtype, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].to(dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for read in (load_model, open_tensors):
        with pytest.raises(CheckpointError, match=r"found lm_head\.weight as .*; expected one of F32"):
            read(folder)


@pytest.mark.parametrize("names", [["model.safetensors", "b.safetensors"], [7], ["x" * 5000], ["../a"]])
def test_the_index_of_a_model_folder(names: list[Any], folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "b.safetensors")
    places = {str(number): name for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError):
        load_model(folder)


@pytest.mark.parametrize("content", [b"", b"no pieces" * 99])
def test_a_tokenizer_that_is_none(content: bytes, folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match="found no model of SentencePiece"):
        CogVLMTokenizer.from_folder(folder)


def test_sat(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    torch.save({"module": {7: torch.ones(1)}}, tmp_path / "1" / FILE_NAME)
    with pytest.raises(CheckpointError, match="found no tensors"):
        open_sat(tmp_path, {})
    for latest in (b"\xff\xfe\0", b"x" * 10**6):
        (tmp_path / "latest").write_bytes(latest)
        with pytest.raises(CheckpointError, match=f"found no {FILE_NAME}"):
            open_sat(tmp_path, {})


@pytest.mark.parametrize("change", [{"r": 0}, {"lora_alpha": "inf"}, {"base": DEEP}, {"twice": True}, {"int": True}])
def test_adapters_of_peft(change: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    tensors = {"lora_A": torch.zeros(2, 64), "lora_B": torch.zeros(400, 2)}
    named = {f"base_model.model.lm_head.{factor}.weight": value for factor, value in tensors.items()}
    if "twice" in change:
        named["lm_head.lora_A.weight"] = torch.zeros(2, 64)
    if "int" in change:
        named = {name: value.to(torch.int64) for name, value in named.items()}
    save_file(named, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **change}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    if "base" in change:
        (tmp_path / "base.json").write_text(change["base"])
    with pytest.raises(CheckpointError):
        open_peft_adapter(tmp_path, folder, {"lm_head.weight": (400, 64)})
