"""Train in three attempts with other batch sizes; in the last, the model folder vanishes and files cannot be written.

Before them, the tars in OUT/foreign are indexed, the server of the shards goes away during a run in OUT/outage: from
the moment that OUT/away exists, and a run in OUT/stopped is asked to stop before its first step.

Usage: saving_rules.py MODEL OUT URL SETTING...      model.path is OUT/model; prints a JSON line per attempt
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepspeed.runtime.zero import parameter_offload
from torch.distributed import distributed_c10d

from cogvlm_ft.build import Run, open_training_data
from cogvlm_ft.checkpoints import saver
from cogvlm_ft.config import load_config
from cogvlm_ft.data import shard
from cogvlm_ft.data.node_indexes import indexed_once_per_node
from cogvlm_ft.data.reader import Sample, open_split
from cogvlm_ft.data.tars import Scan
from cogvlm_ft.errors import ConfigError, DataError, ServerError
from cogvlm_ft.evaluate.evaluate import evaluate
from cogvlm_ft.planning.preflight import check_fits
from cogvlm_ft.runtime.agreement import check_agreement, comparable_settings
from cogvlm_ft.runtime.distributed import (
    barrier,
    computed_by_main,
    gather_to_main,
    init_distributed,
    is_main,
    leave_hangs_to_watchdog,
    rank,
    shut_down,
)
from cogvlm_ft.runtime.nodes import computed_once_per_node
from cogvlm_ft.runtime.stop_signals import StopRequest, StopRequested
from cogvlm_ft.tracking import metrics_log
from cogvlm_ft.train import loop
from cogvlm_ft.train.start import build_checked_run

ATTEMPTS = ((8, 2), (4, 6), (12, None))
"""(global batch size, train.max_steps)"""


def fill_disk() -> None:
    """Let the first rows meet a full disk, and evaluations' results always; no name in checkpoints/ can be synced."""
    real, num_left = metrics_log.append_text, [3]

    def append_text(path: Path, text: str, patience_s: int) -> None:
        if num_left[0]:
            num_left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, text, patience_s)

    def save_evaluation(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def sync_folder(folder: Path) -> bool:
        raise OSError(errno.EIO, "Input/output error", str(folder))

    saver.sync = sync_folder
    metrics_log.append_text = append_text
    loop.save_evaluation = save_evaluation


def lose_server(out: Path, url: str, settings: list[str]) -> None:
    """Train until the server has been away for longer than data.retry_s; print what every rank says of it."""
    own = [f"output_dir={out / 'outage'}", "data.retry_s=0.2", "train.epochs=4"]
    own += ["train.global_batch_size=4", "train.micro_batch_size=2"]
    run = build_checked_run(load_config(None, [*settings, *own, f"data.shards={url}"]), StopRequest())
    assert isinstance(run, Run)
    real, errors, no_stop = loop.train_step, list[str](), StopRequest()

    def train_step(*values: Any, **options: Any) -> Any:
        if options["step"] == 2 and is_main():
            (out / "away").touch()
        return real(*values, **options)

    loop.train_step = train_step
    try:
        loop.train(run, no_stop)
    except ServerError as error:
        errors.append(str(error))
    loop.train_step = real
    for action in (
        lambda: computed_by_main(lambda: (out / "absent").read_bytes()),
        lambda: evaluate_with_one_disk(run, settings),
        lambda: build_checked_run(load_config(None, [*settings, *own, f"data.shards={out / f'of-{rank()}'}"]), no_stop),
        lambda: check_agreement(comparable_settings(load_config(None, [*settings, f"train.epochs={rank() + 1}"]))),
    ):  # what one rank alone cannot read, or knows differently
        try:
            action()
        except (OSError, DataError, ConfigError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    everywhere = gather_to_main(errors)
    if everywhere is not None:
        print(json.dumps({"errors": everywhere}), flush=True)
    run.engine.destroy()


def stop_at_the_start(out: Path, settings: list[str]) -> None:
    """Ask one rank to stop before weights are loaded, then before the first step; print what that leaves."""
    config, endings = load_config(None, [*settings, f"output_dir={out / 'stopped'}"]), list[Any]()
    with StopRequest() as stop_request:
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        try:
            build_checked_run(config, stop_request)
        except StopRequested:
            endings.append("before loading")
        run = build_checked_run(config, StopRequest())
        assert isinstance(run, Run)
        endings.append(loop.train(run, stop_request).step)
    run.engine.destroy()
    if is_main():
        saved = [path.name for path in (out / "stopped" / "checkpoints").glob("*")]
        print(json.dumps({"stopped": [*endings, saved]}), flush=True)


def index_foreign(out: Path, settings: list[str]) -> None:
    """Print which tars each rank scans until it has planned a run over them, and what it knows of them then."""
    scanned, real = list[str](), shard.scan_tar

    def scan_tar(path: Path) -> Scan:
        scanned.append(path.name)
        return real(path)

    shard.scan_tar = scan_tar
    config = load_config(None, [*settings, f"data.shards={out / 'foreign'}", "plan=warn"])
    with indexed_once_per_node(config, ("train", "val")):
        check_fits(config)
        index = open_training_data(config, open_split(config, "val")).index
    shard.scan_tar = real
    places = hashlib.sha256(index.keys.tobytes() + index.image_offset.tobytes() + index.json_offset.tobytes())
    ranks = [computed_once_per_node(rank), computed_once_per_node(rank, rank())]
    everywhere = gather_to_main([scanned, index.data_sha256, places.hexdigest(), ranks])
    if everywhere is not None:
        print(json.dumps({"foreign": everywhere}), flush=True)


def evaluate_with_one_disk(run: Run, settings: list[str]) -> None:
    """Evaluate as launch/evaluate.py does; rank 1 cannot read its second image."""
    reader = open_split(load_config(None, settings), "val")
    real = reader.read

    def read(index: int) -> Sample:
        if index == 3 and rank() == 1:
            raise DataError("val-000000.tar: the disk of rank 1 is gone")
        return real(index)

    reader.read = read  # type: ignore[method-assign]
    options = replace(run.config.evaluate, max_samples=4, batch_size=1)
    evaluate(run.model, run.tokenizer, reader, run.dataset.wording, options, seed=0)


def main() -> None:
    model, out, url, settings = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:]
    init_distributed()
    logging.basicConfig(level=logging.WARNING)
    leave_hangs_to_watchdog()
    hpz = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
    if is_main():
        shutil.copytree(model, out / "model")
        (out / "hpz.json").write_text(json.dumps(hpz))
    barrier()
    index_foreign(out, settings)
    lose_server(out, url, settings)
    stop_at_the_start(out, settings)
    for batch_size, max_steps in ATTEMPTS:
        own = [f"train.global_batch_size={batch_size}", "train.micro_batch_size=2"]
        own += [f"train.max_steps={'null' if max_steps is None else max_steps}"]
        own += [] if max_steps else [f"deepspeed={out / 'hpz.json'}"]
        run = build_checked_run(load_config(None, [*settings, *own]), StopRequest())
        assert isinstance(run, Run)
        barrier()
        if max_steps == ATTEMPTS[1][1]:
            loop.start_or_resume(replace(run, config=replace(run.config, seed=5)))  # warns
        if not max_steps:
            fill_disk()
            if is_main():
                (out / "model").rename(out / "gone")
        state = loop.train(run, StopRequest())
        groups = list(distributed_c10d._world.pg_map)
        timeouts = {group._get_backend(run.engine.device).options._timeout.total_seconds() for group in groups}
        found = {"step": state.step, "samples": state.samples_consumed, "num_groups": len(groups)}
        found |= {"timeouts": sorted(timeouts), "stack": len(parameter_offload.FWD_MODULE_STACK)}
        if is_main():
            print(json.dumps(found), flush=True)
        run.engine.destroy()
    shut_down()


if __name__ == "__main__":
    main()
