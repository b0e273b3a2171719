"""Names, shapes and files: the 17B model on the meta device, and folders that this and other programs can read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.model import CogVLMConfig, CogVLMForCausalLM, load_model

REPOSITORY = Path(__file__).resolve().parents[3]
PUBLISHED_KEYS = REPOSITORY.parent / "shared" / "reference" / "state_dict_17b.json"


def model_17b() -> CogVLMForCausalLM:
    with torch.device("meta"):
        return CogVLMForCausalLM(CogVLMConfig())


def test_17b_parameter_count() -> None:
    model = model_17b()
    groups = {"vision": 0, "experts": 0, "all": 0}
    for name, parameter in model.named_parameters():
        groups["all"] += parameter.numel()
        groups["vision"] += parameter.numel() * name.startswith("model.vision.")
        groups["experts"] += parameter.numel() * (".vision_expert_" in name or ".vision_mlp." in name)
    # EVA2-CLIP-E 4,282,641,664 + adaptor 142,614,528 + boi and eoi 8,192
    assert groups == {"vision": 4_425_264_384, "experts": 6_476_005_376, "all": 17_639_685_376}
    assert len(model.state_dict()) == 1187


@pytest.mark.skipif(not PUBLISHED_KEYS.exists(), reason="../shared/reference/state_dict_17b.json is not there")
def test_17b_keys_and_shapes_are_the_published_ones() -> None:
    published = json.loads(PUBLISHED_KEYS.read_text())
    published = published.get("tensors", published)
    ours = {key: list(value.shape) for key, value in model_17b().state_dict().items()}
    assert ours == {key: list(shape) for key, shape in published.items()}


def test_saved_folder_reads_back_and_tells_others_what_they_need(tiny_model: CogVLMForCausalLM, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["CogVLMForCausalLM"]
    assert config["model_type"] == "cogvlm"
    assert config["torch_dtype"] == "float32"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_cogvlm.CogVLMForCausalLM"
    assert config["vision_config"] == tiny_model.config.vision_config
    for key in ("rms_norm_eps", "template_version", "max_position_embeddings", "pad_token_id", "bos_token_id"):
        assert config[key] == getattr(tiny_model.config, key)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == tiny_model.state_dict().keys()
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in weights

    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        CogVLMForCausalLM.from_pretrained(tmp_path),
        load_model(tmp_path),
    ):
        assert type(loaded) is CogVLMForCausalLM
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, weights[key]), key


def test_inv_freq_may_be_absent(tiny_model: CogVLMForCausalLM, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "inv_freq" not in k}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    for loaded in (CogVLMForCausalLM.from_pretrained(tmp_path), load_model(tmp_path)):
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, weights[key]), key


def test_sharded_folder_loads(tiny_model: CogVLMForCausalLM, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = load_model(tmp_path)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, tiny_model.state_dict()[key]), key


def test_every_key_that_does_not_fit_is_named(tiny_model: CogVLMForCausalLM, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    weights["model.extra"] = torch.zeros(1)
    weights["lm_head.weight"] = weights["lm_head.weight"][:-1].clone()
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path)
    assert "missing model.norm.weight" in str(error.value)
    assert "unexpected model.extra" in str(error.value)
    assert "lm_head.weight has shape" in str(error.value)


def test_pickled_weights_are_refused(tiny_model: CogVLMForCausalLM, tmp_path: Path) -> None:
    tiny_model.config.save_pretrained(tmp_path)
    torch.save(tiny_model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*save_file"):
        load_model(tmp_path)


def test_raised_image_size(tiny_model: CogVLMForCausalLM, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    raised = load_model(tmp_path, image_size=112)
    assert raised.config.vision["num_positions"] == 65
    table = raised.model.vision.patch_embedding.position_embedding.weight
    assert table.shape == (65, tiny_model.config.vision["hidden_size"])
    assert torch.equal(table[0], tiny_model.model.vision.patch_embedding.position_embedding.weight[0])
    raised.save_pretrained(tmp_path / "raised")
    assert load_model(tmp_path / "raised").config.image_size == 112
