"""Load a model folder into partitions on every rank. Usage: loading_rules.py MODEL_FOLDER key=value ..."""

from __future__ import annotations

import json
import sys

import deepspeed
import torch
from transformers import initialization

from cogvlm_ft.config import load_config as load_settings
from cogvlm_ft.model import CogVLMForCausalLM, load_config, load_model
from cogvlm_ft.model.loading import Fetch, load_weights, parameter_shapes
from cogvlm_ft.runtime.distributed import init_distributed, rank, shut_down
from cogvlm_ft.runtime.engine import deepspeed_settings, partition_assign, partitioned


def main() -> None:
    folder, *overrides = sys.argv[1:]
    init_distributed()
    config = load_settings(None, [f"model.path={folder}", "data.shards=s", "output_dir=o", *overrides])
    settings = deepspeed_settings(config)
    with initialization.no_init_weights(), partitioned(settings):
        model = CogVLMForCausalLM(load_config(folder, config.model.image_size))
    parameters = list(model.named_parameters())
    bytes_read = load_counting(folder, parameters)

    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    whole = dict(load_model(folder, config.model.image_size, dtype).named_parameters())
    for name, parameter in parameters:
        with deepspeed.zero.GatheredParameters([parameter]):
            assert parameter.dtype == dtype and torch.equal(parameter.data, whole[name].data), name
    print(json.dumps({"rank": rank(), "bytes_read": bytes_read}), flush=True)
    shut_down()


def load_counting(folder: str, parameters: list) -> int:
    """Load as training does; return the bytes of the slices that this rank read."""
    bytes_read = 0
    assign = partition_assign(parameters)

    def counting(name: str, fetch: Fetch, num_rows: int) -> None:
        def counted(start: int, stop: int) -> torch.Tensor:
            nonlocal bytes_read
            rows = fetch(start, stop)
            bytes_read += rows.nbytes
            return rows

        assign(name, counted, num_rows)

    load_weights(folder, parameter_shapes(parameters), counting)
    return bytes_read


if __name__ == "__main__":
    main()
