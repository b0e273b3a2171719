"""The settings of the DeepSpeed JSON that affect memory."""

from __future__ import annotations

from dataclasses import dataclass

from cogvlm_ft.planning.zero3_coordinator import GatherRules
from cogvlm_ft.runtime.deepspeed_json import read_deepspeed_json
from cogvlm_ft.settings import Config


@dataclass(frozen=True)
class ZeroSettings:
    """Sizes in elements."""

    rules: GatherRules
    reduce_bucket: int
    sub_group: int
    overlap_comm: bool
    offload_optimizer: bool
    offload_param: bool
    pin_optimizer: bool
    pin_param: bool
    secondary_ranks: int  # hpZ: the ranks that share a second copy of the weights; 1: none
    grad_bytes: int


def read_zero_settings(config: Config, gpus_per_node: int) -> ZeroSettings:
    """Read `config.deepspeed`, with DeepSpeed's defaults for missing keys."""
    settings = read_deepspeed_json(config)
    zero = settings["zero_optimization"]
    accumulation = settings.get("data_types", {}).get("grad_accum_dtype")
    secondary = zero.get("zero_hpz_partition_size", 1)
    optimizer, param = (zero.get(key) or {} for key in ("offload_optimizer", "offload_param"))
    return ZeroSettings(
        rules=GatherRules(
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            max_live=int(zero.get("stage3_max_live_parameters", 1e9)),
            max_reuse=int(zero.get("stage3_max_reuse_distance", 1e9)),
            persistence=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            leaf_classes=tuple(zero.get("leaf_module", {}).get("classes", ())),
        ),
        reduce_bucket=int(zero.get("reduce_bucket_size", 5e8)),
        sub_group=int(zero.get("sub_group_size", 1e9)),
        overlap_comm=bool(zero.get("overlap_comm", True)),
        offload_optimizer=optimizer.get("device", "none") != "none",
        offload_param=param.get("device", "none") != "none",
        pin_optimizer=bool(optimizer.get("pin_memory", True)),
        pin_param=bool(param.get("pin_memory", True)),
        secondary_ranks=gpus_per_node if secondary == "auto" else int(secondary),
        grad_bytes=4 if accumulation in ("fp32", "float32") else element_bytes(config),
    )


def element_bytes(config: Config) -> int:
    return 2 if config.train.precision == "bf16" else 4
