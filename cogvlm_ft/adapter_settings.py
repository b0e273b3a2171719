"""Settings of LoRA adapters, and checks of their combinations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.setting_rules import setting

ADAPTER_TARGETS = (
    *("attention.language", "attention.vision_expert", "mlp.language", "mlp.vision_expert"),
    *("vision", "bridge"),
)
FULL_PARTS = ("bridge",)
QUANTIZED_BASES = ("int4",)


@dataclass
class AdapterConfig:
    """LoRA adapters. Small matrices are trained while the weights are frozen; off unless `rank` is set."""

    rank: Optional[int] = setting(
        None, "Rank of the matrices, such as 16. null: no adapters; the model itself is trained.", least=1
    )
    alpha: float = setting(32.0, "Adapters are scaled by alpha / rank.", above=0)
    dropout: float = setting(0.0, "Dropout of the adapters' inputs.", least=0, below=1)
    targets: list[str] = setting(
        list(ADAPTER_TARGETS[:4]),
        "Parts of the model that get adapters: " + ", ".join(f"`{name}`" for name in ADAPTER_TARGETS) + ".",
    )
    full: list[str] = setting([], "Parts that are fully trained in addition to the adapters: `bridge`.")
    start: Optional[str] = setting(
        None, "Folder of an adapter in peft's format to start from. null: new adapters.", is_path=True
    )
    base: Optional[str] = setting(
        None,
        "`int4`: quantise the frozen linear layers to NF4 while they are read (QLoRA), on one GPU. "
        "null: frozen weights in `train.precision`.",
        choices=QUANTIZED_BASES,
    )


def check_adapter(adapter: AdapterConfig) -> None:
    """Raise ConfigError where the settings contradict each other."""
    unknown = [name for name in adapter.targets if name not in ADAPTER_TARGETS]
    if unknown or not adapter.targets:
        raise ConfigError(f"adapter.targets={adapter.targets}: expected some of {', '.join(ADAPTER_TARGETS)}")
    if any(name not in FULL_PARTS for name in adapter.full):
        raise ConfigError(f"adapter.full={adapter.full}: expected [] or some of {', '.join(FULL_PARTS)}")
    if adapter.start and adapter.rank is None:
        raise ConfigError(
            f"adapter.start={adapter.start}: found no adapter.rank; expected the rank of that adapter. Set it"
        )
    if adapter.base and adapter.rank is None:
        raise ConfigError(
            f"adapter.base={adapter.base}: found no adapter.rank; expected adapters, because quantised weights are not "
            "trained. Set adapter.rank, such as 16"
        )
    if twice := set(adapter.full) & set(adapter.targets):
        raise ConfigError(
            f"adapter.full, adapter.targets: found {', '.join(twice)} in both; expected it in one of them. Remove it "
            "from adapter.targets"
        )


def check_base_is_whole(adapter: AdapterConfig, num_ranks: int, *, offloads_weights: bool = False) -> None:
    """Raise ConfigError where quantised weights would have to be partitioned or offloaded."""
    if adapter.base and (num_ranks > 1 or offloads_weights):
        found = f"{num_ranks} GPUs" if num_ranks > 1 else "offload_param"
        raise ConfigError(
            f"adapter.base={adapter.base}: found {found}; expected one GPU that holds the whole model, because ZeRO-3 "
            "does not partition quantised weights. Use one GPU with deepspeed=single_gpu, or adapter.base=null"
        )
