"""SAT checkpoints: every tensor has its official name, and comes back as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cogvlm_ft.checkpoints.sat import FILE_NAME, sat_name
from cogvlm_ft.launch.convert_sat import main
from cogvlm_ft.model import load_model

# Of the classes in THUDM/CogVLM utils/models and SwissArmyTransformer 0.4.
LAYER, VIT = "transformer.layers.1", "mixins.eva.vit_model"
OFFICIAL = {
    "model.embed_tokens.weight": "transformer.word_embeddings.weight",
    "lm_head.weight": "mixins.lm.lm_head.weight",
    "model.norm.weight": "transformer.final_layernorm.weight",
    "model.layers.1.input_layernorm.weight": f"{LAYER}.input_layernorm.weight",
    "model.layers.1.self_attn.language_expert_query_key_value.weight": f"{LAYER}.attention.query_key_value.weight",
    "model.layers.1.self_attn.vision_expert_dense.weight": "mixins.rotary.vision_dense_list.1.weight",
    "model.layers.1.mlp.language_mlp.gate_proj.weight": "mixins.mlp.gate_proj.1.weight",
    "model.layers.1.mlp.language_mlp.up_proj.weight": f"{LAYER}.mlp.dense_h_to_4h.weight",
    "model.layers.1.mlp.vision_mlp.gate_proj.weight": "mixins.mlp.vision_gate_proj.1.weight",
    "model.layers.1.mlp.vision_mlp.down_proj.weight": "mixins.mlp.vision_dense_4h_to_h_list.1.weight",
    "model.vision.boi": "mixins.eva.boi",
    "model.vision.linear_proj.norm1.bias": "mixins.eva.linear_proj.norm1.bias",
    "model.vision.patch_embedding.cls_embedding": f"{VIT}.transformer.word_embeddings.weight",
    "model.vision.patch_embedding.proj.bias": f"{VIT}.mixins.patch_embedding.proj.bias",
    "model.vision.transformer.layers.0.mlp.fc2.bias": f"{VIT}.transformer.layers.0.mlp.dense_4h_to_h.bias",
    "model.vision.transformer.layers.0.attention.dense.bias": f"{VIT}.transformer.layers.0.attention.dense.bias",
}


def test_a_model_goes_to_sat_and_back(start_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model(start_model)
    true = dict(model.named_parameters())
    for ours, theirs in OFFICIAL.items():
        assert sat_name(ours) == theirs
    assert len({sat_name(name) for name in true}) == len(true)

    sat = tmp_path / "sat"
    assert main(["--model", str(start_model), "--out", str(sat), "--dtype", "fp32"]) == 0
    file = sat / "1" / FILE_NAME
    module = torch.load(file, weights_only=True)["module"]  # as SAT reads it: whole, without mapping
    assert module.keys() == {sat_name(name) for name in true}
    assert all(torch.equal(module[sat_name(name)], tensor) for name, tensor in true.items())

    module["mixins.rotary.rotary_emb.inv_freq"] = torch.ones(4)  # a buffer that official files may have
    torch.save({"module": module, "iteration": 1}, file)
    back = ["--sat", str(sat), "--files", str(start_model), "--dtype", "fp32", "--out"]
    assert main([*back, str(tmp_path / "back")]) == 0
    found = dict(load_model(tmp_path / "back").named_parameters())
    assert all(torch.equal(found[name], tensor) for name, tensor in true.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float32"
    assert main([*back, str(tmp_path / "back")]) == 2 and "exists" in capsys.readouterr().err

    for change, word in (
        ({"mixins.lora.q.0.matrix_A.0": torch.ones(1)}, "Merge LoRA"),
        ({"x": torch.ones(1)}, "unexpected x"),
    ):
        torch.save({"module": module | change}, file)
        assert main([*back, str(tmp_path / "other")]) == 2
        assert word in capsys.readouterr().err
    (file.parent / "mp_rank_01_model_states.pt").touch()
    assert main([*back, str(tmp_path / "other")]) == 2 and "model-parallel 1" in capsys.readouterr().err
