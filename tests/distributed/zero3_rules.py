"""Check on every rank what must hold under ZeRO-3. Usage: zero3_rules.py MODEL_FOLDER SHARDS OUT_DIR"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import deepspeed
import torch

from cogvlm_ft.build import build_model_engine
from cogvlm_ft.config import load_config
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.evaluate.evaluate import evaluate, save_evaluation
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model import load_model
from cogvlm_ft.runtime.distributed import init_distributed, is_main, rank, shut_down, world_size
from cogvlm_ft.runtime.engine import inference
from cogvlm_ft.tile_settings import TilesConfig

TILES = TilesConfig(side_px=24, overlap=0.2)


def check_partitions_equal_the_files(model: torch.nn.Module, folder: str) -> None:
    """Check that every tensor is partitioned and, gathered, equals the files."""
    whole = dict(load_model(folder).named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.ds_tensor.numel() == -(-parameter.ds_numel // world_size()), name
        with deepspeed.zero.GatheredParameters([parameter]):
            assert torch.equal(parameter.data, whole[name].data), name


def check_ranks_may_differ_in_images(engine: torch.nn.Module) -> None:
    """Use the published call form: rank 0 has an image, the others only text; forward and backward still end."""
    model, num_patches = engine.module, engine.module.config.num_patches
    types = [0] + [1] * (num_patches + 2) * is_main() + [0] * 5
    ids = torch.arange(len(types))[None] % 50 + 3
    loss = engine(
        input_ids=ids,
        token_type_ids=torch.tensor([types]),
        attention_mask=torch.ones_like(ids),
        images=[[torch.zeros(3, 56, 56)]] if is_main() else [[]],
        labels=ids,
    ).loss
    engine.backward(loss)
    engine.step()
    assert torch.isfinite(loss)
    # transformers' own generate() too: prompts of different length, one with an image and the others without.
    with inference(model):
        new = model.generate(
            input_ids=ids,
            token_type_ids=torch.tensor([types]),
            attention_mask=torch.ones_like(ids),
            images=[[torch.zeros(3, 56, 56)]] if is_main() else [[]],
            max_new_tokens=3 + rank(),
            do_sample=False,
            synced_gpus=True,
        )
    assert new.shape[1] <= ids.shape[1] + 3 + rank()


def main() -> None:
    folder, shards, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    init_distributed()
    settings = [f"model.path={folder}", f"data.shards={shards}", f"output_dir={out}", "train.global_batch_size=6"]
    config = load_config(None, [*settings, "evaluate.max_new_tokens=12", "evaluate.batch_size=2"])
    engine, tokenizer = build_model_engine(config)
    check_partitions_equal_the_files(engine.module, folder)

    reader = ShardReader(load_index(shards, "val"))
    result = evaluate(engine.module, tokenizer, reader, load_wording("box"), config.evaluate, seed=0)
    print(json.dumps({"rank": rank(), "metrics": result.metrics}))
    few = replace(config.evaluate, max_samples=5)
    in_tiles = evaluate(engine.module, tokenizer, reader, load_wording("box"), few, seed=0, tiles=TILES)
    if is_main():
        save_evaluation(result, out)
        save_evaluation(in_tiles, out / "tiles")
    if world_size() > 1:
        check_ranks_may_differ_in_images(engine)
    shut_down()


if __name__ == "__main__":
    main()
