"""data.max_turns_per_image on two real ranks: every turn exactly once an epoch, also when stopped in the middle."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from ranks import REPOSITORY, read_metrics, run, started
from tiny import run_settings

from cogvlm_ft.checkpoints.checkpoint import list_checkpoints
from cogvlm_ft.data.encode import encode_turns
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.look import turns_of
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model import CogVLMTokenizer, load_config

pytestmark = pytest.mark.slow
PROGRAM = REPOSITORY / "tests" / "distributed" / "turns_seen.py"


def settings(shards: Path, start_model: Path, output_dir: Path) -> list[str]:
    changes = ["data.wording=conversation", "data.max_turns_per_image=2", "evaluate.max_samples=1"]
    return run_settings(shards, start_model, output_dir, *changes)


def turns_to_see(shards: Path, start_model: Path) -> Counter[str]:
    """Count all turns of every image."""
    reader, wording = ShardReader(load_index(shards, "train")), load_wording("conversation")
    tokenizer, config = CogVLMTokenizer.from_folder(start_model), load_config(start_model)
    records = [reader.read(i).record for i in range(len(reader))]
    turns = [(record.key, turn) for record in records for turn in turns_of(record, wording, seed=0, epoch=0)]
    encoded = [(key, encode_turns([turn], tokenizer, config)) for key, turn in turns]
    return Counter(json.dumps([key, each.input_ids[each.block_ids == 1].tolist()]) for key, each in encoded)


def turns_seen(out: Path, arguments: list[str]) -> list[Counter[str]]:
    """Count the turns of every step over both ranks."""
    run([PROGRAM, out, *arguments], 2, out / "logs")
    ranks = [json.loads((out / f"rank-{rank}.json").read_text())["steps"] for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1])
    return [Counter(map(json.dumps, a + b)) for a, b in zip(*ranks, strict=True)]


def test_every_turn_once_an_epoch_and_after_a_stop(shards: Path, start_model: Path, tmp_path: Path) -> None:
    split = settings(shards, start_model, tmp_path / "run")
    whole = turns_seen(tmp_path / "whole", split)
    assert sum(whole, Counter()) == turns_to_see(shards, start_model)
    assert len(whole) > 33 // 8 + 1, "more steps than with one sequence per image"

    num_done = len(whole) // 2
    run(["launch/train.py", *split, f"train.max_steps={num_done}"], 2, tmp_path / "logs")
    [checkpoint] = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoint.name == f"step-{num_done:08d}"
    assert [row["step"] for row in read_metrics(tmp_path / "run", "train")] == list(range(1, num_done + 1))
    assert turns_seen(tmp_path / "rest", split) == whole[num_done:]

    with started(["launch/train.py", *split, "data.max_turns_per_image=1"], 2, tmp_path / "logs") as ranks:
        assert ranks.wait() == [2, 2], "the position counts other sequences"
        assert "with another data.max_turns_per_image" in ranks.output()
