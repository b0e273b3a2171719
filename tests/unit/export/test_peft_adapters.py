"""Adapters that peft made: they start a training run, are merged into a model or an export, or are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from cogvlm_ft.build import load_whole_model
from cogvlm_ft.checkpoints.choice import chosen_boxes, save_kept_boxes, trained_wording
from cogvlm_ft.checkpoints.peft_files import WEIGHTS_FILE, open_peft_adapter, put_beside, put_into
from cogvlm_ft.config import load_config
from cogvlm_ft.errors import CheckpointError, ConfigError
from cogvlm_ft.export.adapter import export_merged
from cogvlm_ft.grounding.confidence import KeptBoxes
from cogvlm_ft.grounding.wording import WORDING_FILE, load_wording, save_wording
from cogvlm_ft.launch.export import main
from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer, load_model
from cogvlm_ft.model.adapters import TARGETS, add_adapters, of_base
from cogvlm_ft.model.loading import parameter_shapes, whole_assign
from cogvlm_ft.model.quantized import stored_tensors
from cogvlm_ft.predict.predictor import Asking, load_predictor
from cogvlm_ft.settings import AdapterConfig

SETTINGS = AdapterConfig(rank=4, alpha=8, targets=["attention.language", "vision"], full=["bridge"])


def write_adapter(base: Path, folder: Path, **changes: Any) -> Path:
    """Let peft make and save an adapter whose factors are not zero, and a bridge that is not the model's."""
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 8, "modules_to_save": ["vision.linear_proj"], "init_lora_weights": False}
    targets = "|".join(f"({TARGETS[name]})" for name in SETTINGS.targets)
    model = get_peft_model(load_model(base), LoraConfig(target_modules=targets, **{**options, **changes}))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "modules_to_save" in name:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(start_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(start_model, tmp_path_factory.mktemp("peft") / "adapter")


def logits_of(model: Any, tokenizer: CogVLMTokenizer) -> Tensor:
    plain: CogVLMForCausalLM = model.get_base_model() if isinstance(model, PeftModel) else model
    inputs = plain.build_conversation_input_ids(tokenizer, query="the red circle", images=[torch.ones(3, 56, 56)])
    batch = {k: v[None] for k, v in inputs.items() if k != "images"} | {"images": [inputs["images"]]}
    with torch.no_grad():
        return model.eval()(**batch).logits.float()


def test_it_starts_a_training_run_and_is_merged(
    adapter: Path, start_model: Path, tokenizer: CogVLMTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logits are peft's to 1e-5 in fp32, unmerged, merged in memory, asked, and merged by an export."""
    expected = logits_of(PeftModel.from_pretrained(load_model(start_model), adapter), tokenizer)
    assert (logits_of(load_model(start_model), tokenizer) - expected).abs().max() > 0.1
    started = load_model(start_model)
    add_adapters(started, SETTINGS, seed=0)
    shapes = of_base(parameter_shapes(started.named_parameters()).items())
    opened = open_peft_adapter(adapter, start_model, shapes)
    put_into(started, opened, SETTINGS, whole_assign(started.named_parameters()))
    base, worded = shutil.copytree(start_model, tmp_path / "base"), shutil.copytree(adapter, tmp_path / "worded")
    save_kept_boxes(KeptBoxes(0.9), base)
    save_wording(load_wording("region"), worded / WORDING_FILE)
    arguments = ["--checkpoint", worded, "--base", base, "--out", tmp_path / "merged"]
    assert main([str(argument) for argument in arguments]) == 0
    wording = trained_wording(tmp_path / "merged")
    assert wording and wording.name == "region", "that of the adapter's training"
    assert chosen_boxes(tmp_path / "merged") is None, "which boxes from tiles count was chosen for other weights"
    assert load_predictor(base, Asking(adapter=adapter)).kept == KeptBoxes()
    assert "merged" in capsys.readouterr().out
    asked = load_predictor(start_model, Asking(adapter=adapter)).model
    for model in (started, asked, load_model(tmp_path / "merged")):
        torch.testing.assert_close(logits_of(model, tokenizer), expected, atol=1e-5, rtol=1e-5)
    small = load_predictor(start_model, Asking(adapter=adapter, quantized="int4")).model
    again = load_whole_model(tmp_path / "merged", torch.float32, quantized="int4")
    torch.testing.assert_close(stored_tensors(small), stored_tensors(again), atol=1e-5, rtol=1e-5)
    assert CogVLMTokenizer.from_folder(tmp_path / "merged").encode("a") == tokenizer.encode("a")
    with pytest.raises(CheckpointError, match=r"parts in full .*expected adapters alone"):  # others share the model
        put_beside(load_model(start_model), opened, "shop")


def test_adapters_that_do_not_fit_are_refused(adapter: Path, start_model: Path, tmp_path: Path) -> None:
    model = load_model(start_model)
    add_adapters(model, SETTINGS, seed=0)
    shapes = of_base(parameter_shapes(model.named_parameters()).items())

    def refused(change: str, folder: Path = adapter, settings: AdapterConfig = SETTINGS) -> None:
        other = load_model(start_model)
        add_adapters(other, settings, seed=0)
        with pytest.raises(CheckpointError, match=change):
            put_into(other, open_peft_adapter(folder, start_model, shapes), settings, whole_assign([]))

    refused("adapter.rank: found 8; expected 4", settings=AdapterConfig(8, 8, 0.0, SETTINGS.targets, ["bridge"]))
    refused("adapter.alpha: found 32; expected 8", settings=AdapterConfig(4, 32, 0.0, SETTINGS.targets, ["bridge"]))
    refused("adapter.targets, adapter.full: .* lacks", settings=AdapterConfig(4, 8, 0.0, ["mlp.language"]))
    refused("expected adapter_config.json", folder=tmp_path)

    changed = shutil.copytree(adapter, tmp_path / "changed")
    settings = json.loads((changed / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    refused("found LORA with use_dora; expected plain LORA", folder=changed)
    (changed / "adapter_config.json").write_text(json.dumps(settings))
    tensors = load_file(changed / WEIGHTS_FILE)
    first = next(name for name in tensors if "lora_A" in name)
    save_file(tensors | {first: torch.zeros(4, 7)}, changed / WEIGHTS_FILE)
    refused("1 tensors do not fit .* expected factors of rank 4", folder=changed)
    with pytest.raises(CheckpointError, match="1 tensors do not fit"):
        export_merged(changed, start_model, tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists()
    (changed / "base.json").write_text(json.dumps({"name": "other", "sha256": "0" * 64}))
    refused("as its base; expected other with 000000000000", folder=changed)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("adapter.full=[vision]", r"adapter\.full=\['vision'\]: expected \[\] or some of bridge"),
        ("adapter.targets=[bridge]", "found bridge in both; expected it in one of them"),
        ("adapter.rank=null", "found no adapter.rank; expected the rank"),
        ("adapter.base=int8", r"adapter\.base='int8': expected one of int4"),
    ],
)
def test_settings_that_contradict(setting: str, message: str) -> None:
    fixed = ["model.path=m", "data.shards=s", "output_dir=o", "adapter.rank=4", "adapter.start=a"]
    with pytest.raises(ConfigError, match=message):
        load_config(None, [*fixed, "adapter.full=[bridge]", setting])
