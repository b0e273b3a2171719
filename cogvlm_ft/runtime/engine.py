"""The DeepSpeed ZeRO-3 engine: its settings, its partitioned parameters, its optimizer."""

from __future__ import annotations

import contextlib
import json
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from cogvlm_ft.config import ENGINE_PRESETS, find_preset, num_accum_steps
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.runtime.distributed import device, from_main, gather_to_main, world_size
from cogvlm_ft.runtime.param_gathering import attach_offload
from cogvlm_ft.runtime.partitions import local_range
from cogvlm_ft.runtime.watchdog import progress
from cogvlm_ft.settings import Config


def deepspeed_file(config: Config) -> Path:
    """Return the file that `deepspeed` names: a path, or the name of a preset."""
    return find_preset(config.deepspeed, ENGINE_PRESETS, "deepspeed=")


def read_deepspeed_json(config: Config) -> dict[str, Any]:
    """Return the settings in that file as they are; ConfigError if they cannot be read or are not for ZeRO-3."""
    path = deepspeed_file(config)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"deepspeed={path}: {error}; expected a DeepSpeed JSON") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        raise ConfigError(f"deepspeed={path}: no zero_optimization in it; expected a DeepSpeed JSON for ZeRO-3")
    return settings


def deepspeed_settings(config: Config) -> dict[str, Any]:
    """Collective. The DeepSpeed JSON with our numbers filled in: batch, clipping and precision are our config's alone.

    Its key "//" is for readers: JSON has no comments.
    """
    path, train, settings = deepspeed_file(config), config.train, read_deepspeed_json(config)
    settings.pop("//", None)
    num_steps = num_accum_steps(train.global_batch_size, train.micro_batch_size, world_size())
    ours: dict[str, tuple[str, Any]] = {
        "train_batch_size": ("train.global_batch_size", train.global_batch_size),
        "train_micro_batch_size_per_gpu": ("train.micro_batch_size", train.micro_batch_size),
        "gradient_accumulation_steps": ("train.global_batch_size", num_steps),
        # 0 switches clipping off; left out, DeepSpeed would clip at 1.0.
        "gradient_clipping": ("train.max_grad_norm", train.max_grad_norm),
        "bf16": ("train.precision", {"enabled": train.precision == "bf16"}),
    }
    for key, (our_key, value) in ours.items():
        if settings.get(key, "auto") not in ("auto", value):
            raise ConfigError(
                f"{path}: {key}={settings[key]!r} clashes with {our_key}, which makes it {value!r}: change {our_key}, "
                f"or leave {key} out of the file"
            )
        settings[key] = value
    for key, our_key in (
        ("optimizer", "train.lr, train.beta1, ..."),
        ("scheduler", "train.warmup_fraction"),
        ("fp16", "train.precision"),
    ):
        if key in settings:
            raise ConfigError(f"{path}: {key} is set by {our_key}; leave it out here")
    zero = settings["zero_optimization"]
    if zero.get("stage") != 3:
        raise ConfigError(
            f"{path}: zero_optimization.stage must be 3: model folders are read into partitioned parameters"
        )
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device", "none") not in ("none", "cpu"):
            raise ConfigError(
                f"{path}: zero_optimization.{key}.device={zero[key]['device']!r}: wanted cpu or none; checkpoints are "
                "made of what lies in memory"
            )
    if zero.get("zero_hpz_partition_size") == "auto":
        zero["zero_hpz_partition_size"] = ranks_per_node()
    settings["zero_allow_untested_optimizer"] = True
    settings["zero_force_ds_cpu_optimizer"] = device().type == "cuda"  # build_engine says why
    return settings


def ranks_per_node() -> int:
    """Collective. Ranks on every node; ConfigError if the nodes have different numbers of them."""
    nodes = Counter(from_main(gather_to_main(socket.gethostname())))
    if len(set(nodes.values())) > 1:
        raise ConfigError(f"zero_hpz_partition_size=auto needs as many ranks on every node; found {dict(nodes)}")
    return world_size() // len(nodes)


class _UnfilledInit(deepspeed.zero.Init):
    """Sends nothing: DeepSpeed would send every new parameter from rank 0 to all, and ours come from files later.

    A parameter that is received is whole in memory for a moment, and leaves holes there: measured, half a partition.
    Should DeepSpeed rename the method, that would be so again.
    """

    def _zero_init_param(self, param: Any) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()


def partitioned(settings: dict[str, Any]) -> AbstractContextManager:
    """Inside, parameters are partitioned over the ranks as soon as they are made; their values are anything."""
    return _UnfilledInit(config_dict_or_path=settings)


def partition_assign(
    parameters: Iterable[tuple[str, nn.Parameter]],
) -> Callable[[str, Callable[[int, int], Tensor], int], None]:
    """A function that reads only this rank's slice of a tensor from its file: no gather, no full copy."""
    by_name = dict(parameters)

    def assign(name: str, fetch: Callable[[int, int], Tensor], num_rows: int) -> None:
        progress()
        parameter: Any = by_name[name]
        part = parameter.ds_tensor
        row_size = parameter.ds_numel // num_rows
        start, stop = local_range(parameter)
        part.data.zero_()  # the last rank's padding
        parameter.ds_secondary_tensor = None  # hpZ's copy of the weights before; the next pass makes a new one
        if start < stop:
            first_row = start // row_size
            rows = fetch(first_row, -(-stop // row_size)).reshape(-1)
            part.data[: stop - start].copy_(rows[start - first_row * row_size : stop - first_row * row_size])

    return assign


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Switch off the gradients of parameters whose name fits a pattern such as "model.vision.*"."""
    names = dict(model.named_parameters())
    for pattern in patterns:
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise ConfigError(f"model.freeze: {pattern!r} fits no parameter; names look like {next(iter(names))}")
        for name in matching:
            names[name].requires_grad_(False)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups: matrices with weight decay; norms and biases (one dimension) without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ConfigError("model.freeze leaves nothing to train")
    decayed = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) > 1]
    plain = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_engine(model: nn.Module, config: Config, settings: dict[str, Any]) -> Any:
    """Collective. The model in a DeepSpeed engine with AdamW; `settings` from deepspeed_settings."""
    train = config.train
    if train.tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    freeze(model, config.model.freeze)
    groups = parameter_groups(model, train.weight_decay)
    kwargs: dict[str, Any] = {"lr": train.lr, "betas": (train.beta1, train.beta2), "eps": train.eps}
    optimizer: torch.optim.Optimizer
    offload = settings["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    if offload != "none" and device().type == "cuda":
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, **kwargs)
    else:  # without a GPU too where it is "offloaded": torch's needs no compiler
        optimizer = torch.optim.AdamW(groups, fused=device().type == "cuda", **kwargs)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if offload == "none":
        share_fp32_weights(engine.optimizer)
    attach_offload(model, engine)
    return engine


def share_fp32_weights(optimizer: Any) -> None:
    """Let the optimizer work on the weights themselves where these are fp32 already: 4 of 20 bytes per parameter.

    DeepSpeed means to (stage3.py, _create_fp32_partitions), but compares a device with its name, and so copies them.
    """
    partitions = zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True)
    for weights, master in partitions:
        if weights is not None and (weights.dtype, weights.device) == (master.dtype, master.device):
            master.data = weights.data


@contextlib.contextmanager
def inference(model: nn.Module) -> Any:
    """Evaluation mode without gradients; the former mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
