"""The DeepSpeed ZeRO-3 engine: its settings, its partitioned parameters, its optimizer."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import compiler
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.zero import parameter_offload
from torch import Tensor, nn

from cogvlm_ft.adapter_settings import check_base_is_whole
from cogvlm_ft.config import num_accum_steps
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.runtime.compiled_extensions import use_writable_folder
from cogvlm_ft.runtime.cores import node_id
from cogvlm_ft.runtime.deepspeed_json import deepspeed_file, read_deepspeed_json
from cogvlm_ft.runtime.distributed import (
    apply_timeout,
    device,
    from_main,
    gather_to_main,
    is_main,
    share_cores,
    shared_errors,
    world_size,
)
from cogvlm_ft.runtime.param_gathering import attach_offload
from cogvlm_ft.runtime.partitions import local_range, start_averages
from cogvlm_ft.runtime.tf32 import allow_tf32
from cogvlm_ft.runtime.trained_parameters import freeze, log_groups, parameter_groups
from cogvlm_ft.runtime.watchdog import progress
from cogvlm_ft.settings import Config


def deepspeed_settings(config: Config, *, of_training: bool = True) -> dict[str, Any]:
    """Complete the DeepSpeed JSON with the config's batch sizes, clipping and precision. Collective.

    of_training: false to ignore the batch sizes in the JSON. The config alone sets these numbers. Raises
    ConfigError.
    """
    path, train, settings = deepspeed_file(config), config.train, read_deepspeed_json(config)
    num_steps = num_accum_steps(train.global_batch_size, train.micro_batch_size, world_size())
    ours: dict[str, tuple[str, Any]] = {
        "train_batch_size": ("train.global_batch_size", train.global_batch_size),
        "train_micro_batch_size_per_gpu": ("train.micro_batch_size", train.micro_batch_size),
        "gradient_accumulation_steps": ("train.global_batch_size", num_steps),
        # 0 disables clipping; without the key, DeepSpeed would clip at 1.0.
        "gradient_clipping": ("train.max_grad_norm", train.max_grad_norm),
        "bf16": ("train.precision", {"enabled": train.precision == "bf16"}),
    }
    for key, (our_key, value) in ours.items():
        if not of_training and not isinstance(value, dict):
            settings.pop(key, None)
        if settings.get(key, "auto") not in ("auto", value):
            raise ConfigError(
                f"{path}: {key}: found {settings[key]!r}; expected {value!r}, as set by {our_key}. Change {our_key}, "
                f"or remove {key} from the file"
            )
        settings[key] = value
    zero = settings["zero_optimization"]
    if of_training and config.adapter.rank and zero.get("leaf_module"):
        raise ConfigError(
            f"{path}: zero_optimization.leaf_module: found modules that are gathered as a whole; expected none with "
            "adapter.rank, whose gradients DeepSpeed would lose. Remove leaf_module, or use deepspeed=zero3"
        )
    if of_training:
        offload = zero.get("offload_param", {}).get("device", "none")
        check_base_is_whole(config.adapter, world_size(), offloads_weights=offload != "none")
    if zero.get("zero_hpz_partition_size") == "auto":
        zero["zero_hpz_partition_size"] = ranks_per_node()
    settings["zero_allow_untested_optimizer"] = True
    settings["zero_force_ds_cpu_optimizer"] = device().type == "cuda"  # see build_engine
    try:
        DeepSpeedConfig(copy.deepcopy(settings))
    except (DeepSpeedConfigError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split()).rstrip('.')}. Correct the file") from error
    return settings


def inference_settings(config: Config) -> dict[str, Any]:
    """Complete the DeepSpeed JSON for an engine without an optimizer, on any number of ranks. Collective."""
    one = replace(config.train, global_batch_size=world_size(), micro_batch_size=1)
    settings = deepspeed_settings(replace(config, train=one), of_training=False)
    settings["zero_optimization"].pop("offload_optimizer", None)
    return settings


def ranks_per_node() -> int:
    """Return the number of ranks on each node. Collective."""
    return ranks_of_each(from_main(gather_to_main(node_id())))


def ranks_of_each(nodes: Sequence[str]) -> int:
    """Return the number of ranks on each node; ConfigError if it differs, or if ranks alternate between nodes.

    nodes: that of every rank. DeepSpeed takes consecutive ranks as those of a node.
    """
    sizes = list(Counter(nodes).values())
    if len(set(sizes)) > 1:
        raise ConfigError(
            f"zero_hpz_partition_size=auto: found {' and '.join(map(str, sizes))} ranks on the nodes; expected as many "
            "on every node"
        )
    if any(node != nodes[number - number % sizes[0]] for number, node in enumerate(nodes)):
        raise ConfigError(
            "zero_hpz_partition_size=auto: found ranks that alternate between nodes; expected consecutive ranks on "
            "each node. Start them with srun --distribution=block, or deepspeed"
        )
    return sizes[0]


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon optimizer without torch's compiler.

    ZeRO-3 imports it to ask whether the optimizer is of its type. Its functions are decorated with `compile()`, which
    imports torch's compiler: 2.3 s of CPU time at every start. `build_engine` has no use for Muon.
    """
    compile_function = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_function


_import_muon_uncompiled()


class _UnfilledInit(deepspeed.zero.Init):
    """Partition new parameters without filling them: their values are read from files later.

    DeepSpeed would broadcast every new parameter from rank 0. A parameter that is received is whole in memory for a
    moment and fragments it: measured, by half a partition. This depends on a private method of DeepSpeed: if that is
    renamed, the broadcasts return.
    """

    def _zero_init_param(self, param: Any) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()


def partitioned(settings: dict[str, Any]) -> AbstractContextManager:
    """Partition parameters over the ranks as soon as they are created inside; their values are undefined."""
    return _UnfilledInit(config_dict_or_path=settings)


def partition_assign(
    parameters: Iterable[tuple[str, nn.Parameter]],
) -> Callable[[str, Callable[[int, int], Tensor], int], None]:
    """Return a function that reads only this rank's slice of a tensor from its file: no gather, no full copy."""
    by_name = dict(parameters)

    def assign(name: str, fetch: Callable[[int, int], Tensor], num_rows: int) -> None:
        progress()
        parameter: Any = by_name[name]
        part = parameter.ds_tensor
        row_size = parameter.ds_numel // num_rows
        start, stop = local_range(parameter)
        part.data.zero_()  # the last rank's padding
        parameter.ds_secondary_tensor = None  # hpZ's copy of the old weights; the next pass makes a new one
        if start < stop:
            first_row = start // row_size
            rows = fetch(first_row, -(-stop // row_size)).reshape(-1)
            part.data[: stop - start].copy_(rows[start - first_row * row_size : stop - first_row * row_size])

    return assign


def build_engine(model: nn.Module, config: Config, settings: dict[str, Any]) -> Any:
    """Build a DeepSpeed engine with AdamW around the model. Collective.

    settings: from `deepspeed_settings`.
    """
    train = config.train
    allow_tf32(train.tf32)
    freeze(model, config)
    groups = parameter_groups(model, train)
    if is_main():
        log_groups(groups)
    kwargs: dict[str, Any] = {"lr": train.lr, "betas": (train.beta1, train.beta2), "eps": train.eps}
    optimizer: torch.optim.Optimizer
    offload = settings["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    if offload != "none" and device().type == "cuda":
        share_cores("optimizer on the CPU")
        with shared_errors():
            use_writable_folder()
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, **kwargs)
    else:  # also for offloading without a GPU: torch's optimizer needs no compiler
        optimizer = torch.optim.AdamW(groups, fused=device().type == "cuda", **kwargs)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if offload == "none":
        share_fp32_weights(engine.optimizer)
    if train.ema:
        start_averages(engine)
    attach_offload(model, engine)
    apply_timeout()
    return engine


def forget_left_modules(engine: Any) -> None:
    """Empty DeepSpeed's stack of the modules in their forward pass, between steps.

    Gradient checkpointing leaves recomputed modules before their end, which DeepSpeed does not notice: the stack would
    grow by all of them at every micro-batch.
    """
    parameter_offload.FWD_MODULE_STACK[:] = [engine.module]


def build_inference_engine(model: nn.Module, settings: dict[str, Any]) -> Any:
    """Build a DeepSpeed engine that only gathers the parameters: no gradients, no optimizer. Collective.

    settings: from `inference_settings`.
    """
    model.requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    attach_offload(model, engine)
    return engine


def share_fp32_weights(optimizer: Any) -> None:
    """Let the optimizer update fp32 weights in place: saves 4 of 20 bytes per parameter.

    DeepSpeed intends to (stage3.py, _create_fp32_partitions), but compares a device with its name, so it copies them.
    """
    partitions = zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True)
    for weights, master in partitions:
        if weights is not None and (weights.dtype, weights.device) == (master.dtype, master.device):
            master.data = weights.data


@contextlib.contextmanager
def inference(model: nn.Module) -> Any:
    """Switch to evaluation mode without gradients; restore the former mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
