"""What a ZeRO-3 engine does on a GPU, compared with plain torch on CPU and with the planner's estimates."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
from deepspeed.runtime.zero import parameter_offload
from gpu_lines import Line, at_most, largest_difference
from gpu_small_run import LR, batches_of, build_small_run, losses, run_config, train_steps, write_json

from cogvlm_ft.build import Run
from cogvlm_ft.checkpoints.checkpoint import TrainState, load_checkpoint
from cogvlm_ft.checkpoints.saver import CheckpointSaver
from cogvlm_ft.data.collate import Batch
from cogvlm_ft.model import load_model
from cogvlm_ft.pinned_memory import allocated_bytes, rounded_up_to
from cogvlm_ft.planning.memory import Cluster, Planner
from cogvlm_ft.run_folder import step_name
from cogvlm_ft.runtime.distributed import device, init_distributed
from cogvlm_ft.runtime.engine import parameter_groups
from cogvlm_ft.runtime.partitions import local_weight
from cogvlm_ft.settings import CheckpointConfig

ROUNDING = 1e-3  # relative difference of losses after some steps; GPU kernels add in another order
MIB = 2**20


def check_engine(setup: Any) -> list[Line]:
    """Train, save in the middle in both ways, resume; a step with NaN; bytes per parameter."""
    num_steps, saved = (4, 2) if setup.tiny else (20, 10)
    init_distributed()
    run = build_small_run(setup, "engine")
    steps = batches_of(run, 0, num_steps)
    found = losses(train_steps(run, steps[:saved]))
    folders = {on: setup.out / "runs" / f"saved-background-{on}" for on in (True, False)}
    for on, folder in folders.items():
        saver = CheckpointSaver(run.engine, folder, run.save_model_files, CheckpointConfig(background=on))
        saver.start(TrainState(step=saved))
        if not on:
            saver.close(saved)
        else:
            background = saver  # it is written while the next steps change the weights
    found += losses(train_steps(run, steps[saved:], saved))
    background.close(saved)
    lines = [at_most("losses against CPU", largest_difference(found, cpu_losses(run, steps)), ROUNDING)]
    lines += [*bytes_per_parameter(run), step_with_nan(run, steps[0])]
    run.engine.destroy()
    for on, folder in folders.items():
        resumed = build_small_run(setup, "engine")
        load_checkpoint(resumed.engine, folder / step_name(saved))
        after = losses(train_steps(resumed, steps[saved:], saved))
        name = f"resumed, checkpoint.background={str(on).lower()}: losses"
        lines.append(at_most(name, largest_difference(after, found[saved:]), ROUNDING))
        resumed.engine.destroy()
    return lines


def cpu_losses(run: Run, steps: list[list[Batch]]) -> list[float]:
    """Train the same model on the same batches with torch's AdamW on CPU."""
    train = run.config.train
    model = load_model(run.config.model.folder).train()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, train), lr=LR, betas=(train.beta1, train.beta2), eps=train.eps
    )
    found = []
    for batches in steps:
        num_tokens, total = sum(batch.num_target_tokens for batch in batches), 0.0
        optimizer.zero_grad()
        for batch in batches:
            inputs = {name: getattr(batch, name) for name in ("input_ids", "pixel_values", "position_ids", "block_ids")}
            out = model(**inputs, labels=batch.labels, num_items_in_batch=num_tokens, return_logits=False)
            out.loss.backward()
            total += float(out.loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        optimizer.step()
        found.append(total)
    return found


def held_bytes(run: Run) -> dict[str, int]:
    """Return the bytes of the tensors that an engine holds, by kind; two names of one memory count once."""
    optimizer = run.engine.optimizer
    weights = [p.ds_tensor for group in optimizer.fp16_groups for p in group]
    addresses = {part.untyped_storage().data_ptr() for part in weights}
    masters = [
        part for part in optimizer.fp32_partitioned_groups_flat if part.untyped_storage().data_ptr() not in addresses
    ]
    flat = optimizer.fp32_partitioned_groups_flat
    states = optimizer.optimizer.state.values()
    return {
        "weights": sum(part.nbytes for part in weights),
        "gradients": optimizer.grad_partitions_flat_buffer.nbytes,
        "fp32 gradients": sum(part.grad.nbytes for part in flat if part.grad is not None),
        "master weights": sum(part.nbytes for part in masters),
        "Adam": sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq")),
    }


def bytes_per_parameter(run: Run) -> list[Line]:
    num_parameters = sum(p.ds_numel for p in run.model.parameters())
    held = held_bytes(run)
    held.pop("fp32 gradients")  # lent from the gradients for the update
    per_parameter = sum(held.values()) / num_parameters
    lines = [Line("bytes per parameter", abs(per_parameter - 16) < 0.1, f"{per_parameter:.2f}; expected 16")]
    if device().type == "cuda":
        planner = Planner(run.config, run.model.config, Cluster(1, 1))
        expected = planner.num_parameters * 16 + planner._bucket_bytes()
        torch.cuda.empty_cache()
        lines.append(at_most("allocated on the GPU, of the estimate", torch.cuda.memory_allocated() / expected, 1.15))
    return lines


def step_with_nan(run: Run, batches: list[Batch]) -> Line:
    before = [local_weight(p).clone() for p in run.model.parameters()]
    poisoned = [dataclasses.replace(batch, pixel_values=batch.pixel_values * torch.nan) for batch in batches]
    [stats] = train_steps(run, [poisoned])
    same = all(torch.equal(old, local_weight(p)) for old, p in zip(before, run.model.parameters(), strict=True))
    found = f"skipped: {stats.is_skipped}; weights unchanged: {same}"
    return Line("a step whose image is NaN", stats.is_skipped and same, found)


def check_offload(setup: Any) -> list[Line]:
    """Train with both offload presets; compare what is held in host memory, and pinned, with the estimates."""
    init_distributed()
    lines = []
    for preset in ("zero3_offload_optimizer", "zero3_offload_all"):
        pinned_before = pinned_bytes()
        run = build_small_run(setup, preset, f"deepspeed={preset}")
        stats = train_steps(run, batches_of(run, 0, 3))
        falls = losses(stats)[-1] < losses(stats)[0]
        held = held_bytes(run)
        if "all" not in preset:
            held.pop("weights")
        limit = rounded_up_to(os.environ)
        planner = Planner(run.config, run.model.config, Cluster(1, 1))
        estimate = planner.estimate(planner_shape(), evaluation=False)
        share = sum(held.values()) / estimate.host["offloaded"]
        lines.append(Line(f"{preset}: the loss falls", falls, f"{losses(stats)[0]:.3f} to {losses(stats)[-1]:.3f}"))
        lines.append(Line(f"{preset}: offloaded, of the estimate", abs(share - 1) < 0.02, f"{share:.3f}; expected 1"))
        if device().type == "cuda":
            expected = allocated_bytes(planner._pinned().kept, limit)
            found = (pinned_bytes() - pinned_before) / expected
            lines.append(Line(f"{preset}: pinned, of the estimate", abs(found - 1) < 0.1, f"{found:.3f}; expected 1"))
        run.engine.destroy()
        del run
        gc.collect()  # what this engine has pinned does not count for the next
    return lines


def pinned_bytes() -> int:
    """Return the bytes of pinned memory in use, without what torch keeps for later."""
    if device().type != "cuda":
        return 0
    stats = torch.cuda.host_memory_stats()
    return stats["active_bytes.current"] if "active_bytes.current" in stats else stats["allocated_bytes.current"]


def planner_shape() -> Any:
    from cogvlm_ft.planning.activations import MicroBatchShape

    return MicroBatchShape(turns=1, turn_tokens=8, labelled_tokens=4)


def check_two_ranks(setup: Any) -> list[Line]:
    """Train on two ranks, on one GPU over gloo (NCCL refuses that), and alone: the losses are the same."""
    num_steps = 2 if setup.tiny else 10
    run_config(setup, "two_ranks")  # makes the files, once
    context: Any = multiprocessing.get_context("spawn" if setup.device == "cuda" else "fork")
    expected = run_ranks(context, setup, 1, num_steps)
    found = run_ranks(context, setup, 2, num_steps)
    total = [sum(parts) for parts in zip(*found, strict=True)]
    return [at_most("losses of two ranks against one", largest_difference(total, expected[0]), ROUNDING)]


def run_ranks(context: Any, setup: Any, world_size: int, num_steps: int) -> list[list[float]]:
    """Return each rank's losses."""
    from torch.distributed import TCPStore

    port = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    files = [setup.out / "runs" / f"losses-{rank}-of-{world_size}.json" for rank in range(world_size)]
    processes = [
        context.Process(target=be_rank, args=(setup, rank, world_size, port, num_steps, file))
        for rank, file in enumerate(files)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise RuntimeError(f"{world_size} ranks over gloo ended with {codes}")
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def be_rank(setup: Any, rank: int, world_size: int, port: int, num_steps: int, file: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="2")
    torch.distributed.init_process_group("gloo")  # DeepSpeed takes the group that it finds
    init_distributed()
    run = build_small_run(setup, "two_ranks", "train.micro_batch_size=1")
    write_json(file, losses(train_steps(run, batches_of(run, 0, num_steps))))
    torch.distributed.barrier()


def check_compile(setup: Any) -> list[Line]:
    """Train with and without model.compile. In toy sizes the functions are traced, but not compiled."""
    init_distributed()
    compiling = functools.partial(torch.compile, backend="eager") if setup.tiny else torch.compile
    found = []
    with patch.object(torch, "compile", compiling):
        for is_compiled in (False, True):
            run = build_small_run(setup, "compile", f"model.compile={str(is_compiled).lower()}")
            found.append(losses(train_steps(run, batches_of(run, 0, 3))))
            run.engine.destroy()
    return [at_most("losses with model.compile against without", largest_difference(found[1], found[0]), ROUNDING)]


def check_memory(setup: Any) -> list[Line]:
    """Train many steps: neither the GPU's memory, nor the host's, nor DeepSpeed's lists grow."""
    num_steps, warm = (12, 4) if setup.tiny else (500, 100)
    init_distributed()
    run = build_small_run(setup, "memory")
    steps = batches_of(run, 0, 8)
    facts = []
    for start, stop in ((0, warm), (warm, num_steps)):
        for step in range(start, stop):
            train_steps(run, [steps[step % len(steps)]], step)
        allocated = torch.cuda.memory_allocated() if device().type == "cuda" else 0
        resident = psutil.Process().memory_info().rss
        facts.append((allocated, resident, len(parameter_offload.FWD_MODULE_STACK)))
    gpu, host, entries = (after - before for before, after in zip(*facts, strict=True))
    return [
        at_most(f"growth on the GPU from step {warm} to {num_steps}", gpu / MIB, 1.0, " MiB"),
        at_most(f"growth of host memory from step {warm} to {num_steps}", host / MIB, 100.0, " MiB"),
        at_most("growth of DeepSpeed's stack of modules", entries, 0, " entries"),
    ]
