"""Be single ranks of a large job, one after the other, and record the collectives that each issues.

Usage: fake_ranks.py MODEL SHARDS OUT SITUATION:WORLD_SIZE:RANK,RANK... ...

torch's fake process group completes every collective at once with this rank's own tensors, so no other rank runs.
Each rank trains a step, evaluates and trains again, with the settings of one of SITUATIONS.
OUT/SITUATION-WORLD_SIZE-RANK.txt lists its collectives, one a line.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partitioned_param_coordinator
from torch.testing._internal.distributed import fake_pg

from cogvlm_ft.build import build_model_engine
from cogvlm_ft.config import load_config
from cogvlm_ft.data.collate import Example, collate
from cogvlm_ft.data.encode import encode_turns
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.plan import Item
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.evaluate.evaluate import evaluate
from cogvlm_ft.grounding.targets import Turn
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.runtime import distributed
from cogvlm_ft.runtime.distributed import init_distributed
from cogvlm_ft.runtime.partitions import averages_as_weights, update_averages
from cogvlm_ft.train.step import train_step

SITUATIONS = {
    "plain": [],
    "ema": ["train.ema=0.9"],
    "adapters": ["adapter.rank=2"],
    "tiles": ["data.tiles.side_px=60"],  # of photos of several sizes: ranks ask about different numbers of looks
}
RECORDED = ("all_reduce", "all_gather_into_tensor", "all_gather", "reduce_scatter_tensor", "broadcast", "barrier")


@contextmanager
def recorded(number: int, sent: list[Any]) -> Iterator[list[str]]:
    """Collect the name and the sizes of every collective, in order; pickled objects count by their name only.

    sent: what rank 0 broadcasts is added to it, and other ranks receive it from there.
    """
    calls: list[str] = []
    originals = {name: getattr(dist, name) for name in (*RECORDED, "gather_object", "broadcast_object_list")}

    def recording(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sizes = [each.numel() for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
            calls.append(f"{name} {sizes}")
            return function(*args, **kwargs)

        return call

    def gather_object(value: Any, gathered: list[Any] | None = None, **_: Any) -> None:
        calls.append("gather_object")
        if gathered is not None:
            of_others = [] if isinstance(value, list) else value  # no images, or the same facts
            gathered[:] = [value, *[of_others] * (len(gathered) - 1)]

    def broadcast_object_list(box: list[Any], **_: Any) -> None:
        calls.append("broadcast_object_list")
        if number == 0:
            sent.append(copy.deepcopy(box[0]))
        else:
            box[0] = sent.pop(0)

    def same_on_all_ranks(numbers: list[int]) -> None:
        calls.append(f"order of modules {numbers}")

    for name in RECORDED:
        setattr(dist, name, recording(name, originals[name]))
    dist.gather_object = gather_object
    # It compares with what rank 0 broadcasts, which nothing answers here.
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = same_on_all_ranks
    dist.broadcast_object_list = broadcast_object_list
    try:
        yield calls
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


def be_rank(situation: str, number: int, num_ranks: int, model: str, shards: str, out: Path) -> list[str]:
    """Return the collectives of one rank: a step, an evaluation, a step."""
    os.environ.update(RANK=str(number), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(number % 8))
    dist.init_process_group("fake", rank=number, world_size=num_ranks, store=fake_pg.FakeStore())
    (out / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    settings = [f"model.path={model}", f"data.shards={shards}", f"output_dir={out}", f"deepspeed={out}/zero.json"]
    settings += [f"train.global_batch_size={num_ranks}", "train.micro_batch_size=1", "evaluate.max_new_tokens=2"]
    settings += ["evaluate.batch_size=2", "evaluate.gather=layerwise"]
    config = load_config(None, [*settings, *SITUATIONS[situation]])
    broadcasts = out / f"{situation}-{num_ranks}-broadcasts.pickle"  # of rank 0, which comes first
    sent = pickle.loads(broadcasts.read_bytes()) if number else []
    with recorded(number, sent) as calls, patch.object(distributed, "share_cores"):  # a fake group gathers nothing
        init_distributed()  # DeepSpeed looks torch's functions up here
        engine, tokenizer = build_model_engine(config)
        for parameter in engine.module.parameters():
            if hasattr(parameter, "ds_tensor"):
                parameter.ds_tensor.fill_(0.01)  # the same on all ranks, as after a real gather
        turns = [Turn("dog", "No.")] * (1 + number % 2)
        image = torch.ones(3, 56, 56)
        encoded = encode_turns(turns, tokenizer, engine.module.config)
        batch = collate([Example("x", Item(0, 0, 1.0), image, encoded, 1.0, len(turns))])
        train_step(engine, [batch], lr=0.0, seed=0, step=0)
        reader = ShardReader(load_index(shards, "val"))
        options = {"seed": 0, "tiles": config.data.tiles}
        evaluate(engine.module, tokenizer, reader, load_wording("box"), config.evaluate, **options)
        if config.train.ema:
            update_averages(engine, config.train.ema)
            with averages_as_weights(engine):
                evaluate(engine.module, tokenizer, reader, load_wording("box"), config.evaluate, **options)
        train_step(engine, [batch], lr=0.0, seed=0, step=1)
    if number == 0:
        broadcasts.write_bytes(pickle.dumps(sent))
    return calls


def main() -> None:
    model, shards, out, *jobs = sys.argv[1:]
    for job in jobs:
        situation, num_ranks, numbers = job.split(":")
        for number in map(int, numbers.split(",")):
            child = os.fork()  # DeepSpeed keeps its process groups for the life of a process
            if child:
                assert os.waitpid(child, 0)[1] == 0
                continue
            calls = be_rank(situation, number, int(num_ranks), model, shards, Path(out))
            Path(out, f"{situation}-{num_ranks}-{number}.txt").write_text("\n".join(calls), encoding="utf-8")
            os._exit(0)


if __name__ == "__main__":
    main()
