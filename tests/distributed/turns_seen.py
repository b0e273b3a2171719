"""Write the turns of every step, from a run's position to the end of its epoch, on every rank.

Usage: turns_seen.py OUT_FOLDER key=value ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cogvlm_ft.build import build_run
from cogvlm_ft.config import load_config
from cogvlm_ft.data.collate import Batch
from cogvlm_ft.runtime.distributed import init_distributed, rank, shut_down
from cogvlm_ft.train.loop import start_or_resume
from cogvlm_ft.train.step_reader import epoch_steps


def turns_of(batch: Batch) -> list[tuple[str, list[int]]]:
    """Return (key, tokens) of turns with weight."""
    found = []
    for row in range(len(batch.keys)):
        blocks = batch.block_ids[row]
        for block in range(1, int(blocks.max()) + 1):
            if batch.weight[row] > 0:
                found.append((batch.keys[row], batch.input_ids[row][blocks == block].tolist()))
    return found


def main() -> None:
    out, settings = Path(sys.argv[1]), sys.argv[2:]
    init_distributed()
    run = build_run(load_config(None, settings))
    state, _ = start_or_resume(run)
    steps = [[turn for batch in step for turn in turns_of(batch)] for step in epoch_steps(run, state.samples_consumed)]
    out.mkdir(parents=True, exist_ok=True)
    (out / f"rank-{rank()}.json").write_text(json.dumps({"num_samples": run.plan.num_samples, "steps": steps}))
    shut_down()


if __name__ == "__main__":
    main()
