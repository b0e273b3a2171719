"""DeepSpeed files as transformers' Trainer takes them: "auto", floats, and what contradicts the config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cogvlm_ft.config import load_config
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.planning.zero_settings import read_zero_settings
from cogvlm_ft.runtime.deepspeed_json import read_deepspeed_json
from cogvlm_ft.runtime.engine import deepspeed_settings
from cogvlm_ft.settings import Config

OF_TRAINER = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "offload_param": {"device": "none", "pin_memory": "auto"},
    },
}


def config_of(folder: Path, settings: dict[str, Any], *more: str) -> Config:
    file = folder / "zero3.json"
    file.write_text(json.dumps(settings))
    return load_config(None, ["model.path=m", "data.shards=s", "output_dir=o", f"deepspeed={file}", *more])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_auto_means_the_config_or_the_default(tmp_path: Path, precision: str) -> None:
    config = config_of(tmp_path, OF_TRAINER, f"train.precision={precision}")
    settings = deepspeed_settings(config)
    assert "auto" not in json.dumps(settings) and "fp16" not in settings
    assert settings["bf16"] == {"enabled": precision == "bf16"}
    zero = settings["zero_optimization"]
    assert zero["sub_group_size"] == 10**9 and isinstance(zero["sub_group_size"], int)
    assert zero["offload_param"] == {"device": "none"} and "reduce_bucket_size" not in zero
    assert read_zero_settings(config, 8).reduce_bucket == 5 * 10**8  # DeepSpeed's default


def test_the_number_of_ranks_of_a_node_stays_open(tmp_path: Path) -> None:
    zero = {"stage": 3, "zero_hpz_partition_size": "auto"}
    config = config_of(tmp_path, {"zero_optimization": zero})
    assert read_deepspeed_json(config)["zero_optimization"] == zero
    assert read_zero_settings(config, 8).secondary_ranks == 8


def test_numbers_as_text_null_and_comments_are_understood(tmp_path: Path) -> None:
    zero = {"stage": "3", "reduce_bucket_size": "2e8", "sub_group_size": None, "offload_optimizer": None, "//": "why"}
    zero["offload_param"] = {"device": "none", "buffer_size": "1e8"}
    config = config_of(tmp_path, {"zero_optimization": zero, "bf16": None})
    config_file = tmp_path / "zero3.json"
    config_file.write_bytes(b"\xef\xbb\xbf" + config_file.read_bytes())  # as Notepad saves it
    expected = {"stage": 3, "reduce_bucket_size": 2 * 10**8}
    expected["offload_param"] = {"device": "none", "buffer_size": 10**8}
    assert deepspeed_settings(config)["zero_optimization"] == expected
    assert read_zero_settings(config, 8).reduce_bucket == 2 * 10**8


@pytest.mark.parametrize(
    ("zero", "named"),
    [
        ({"reduce_bucket_size": "many"}, "zero_optimization.reduce_bucket_size: found 'many'; expected a valid int"),
        ({"reduce_bucket_size": -1}, "reduce_bucket_size: found -1; expected greater than 0"),
        ({"reduce_bucket_sise": 1}, "reduce_bucket_sise: found a key unknown to this DeepSpeed"),
        ({"offload_optimizer": "cpu"}, "offload_optimizer: found 'cpu'; expected a valid dictionary"),
        ({"leaf_module": "DecoderLayer"}, "zero_optimization: leaf_module"),
        ({"cpu_offload": True}, "cpu_offload: found True, the form of earlier versions"),
        ({"stage": 2}, "stage: found 2; expected 3"),
    ],
)
def test_the_plan_refuses_what_training_refuses(tmp_path: Path, zero: dict[str, Any], named: str) -> None:
    config = config_of(tmp_path, {"zero_optimization": {"stage": 3, **zero}})
    for read in (deepspeed_settings, lambda config: read_zero_settings(config, 8)):
        with pytest.raises(ConfigError, match=named) as error:
            read(config)
        assert "\n" not in str(error.value) and "zero3.json" in str(error.value)


def test_what_deepspeed_has_removed_is_a_mistake_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"zero3\.json: .*elasticity.* Correct the file"):
        deepspeed_settings(config_of(tmp_path, {**OF_TRAINER, "elasticity": {"enabled": True}}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_size": 15099494.4}},
            r"reduce_bucket_size: found 15099494\.4",
        ),
        ({"bf16": {"enabled": False}}, r"bf16: found \{'enabled': False\}; expected \{'enabled': True\}"),
        ({"fp16": {"enabled": True}}, "found fp16, which is set by train.precision"),
        ({"gradient_clipping": 0.5}, "gradient_clipping: found 0.5; expected 1.0, as set by train.max_grad_norm"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    config = config_of(tmp_path, {**OF_TRAINER, **changes}, "train.precision=bf16")
    with pytest.raises(ConfigError, match=named):
        deepspeed_settings(config)
