"""Check the links between ranks: their bandwidth, and whether all ranks agree on the engine's settings."""

from __future__ import annotations

from typing import Any

from cogvlm_ft.doctor.examination import Examination, Finding, Reading, green, yellow
from cogvlm_ft.planning.zero_settings import element_bytes
from cogvlm_ft.runtime.bandwidth import Rates, measure_rates
from cogvlm_ft.runtime.distributed import world_size
from cogvlm_ft.runtime.engine import deepspeed_settings

PASS_S = 10.0  # for the weights of one pass; above it the network limits training on any GPU
PASSES = 3  # ZeRO-3 sends every weight for the forward and the backward pass, and its gradient
UNEVEN = 3.0  # times slower than the fastest


def read_links(_: Examination) -> Rates | None:
    return measure_rates() if world_size() > 1 else None


def judge_links(examination: Examination, readings: list[Reading]) -> list[Finding]:
    if world_size() == 1:
        return [green("1 rank, nothing to measure; start this under deepspeed, torchrun or srun to measure them")]
    slowest: Rates = min((part.facts for part in readings), key=lambda rates: rates.all_gather)
    reduced = min(part.facts.all_reduce for part in readings)
    last = min(readings, key=lambda part: part.facts.to_next)
    after = readings[(last.rank + 1) % len(readings)]
    neighbours = f"rank {last.rank} on {last.host} to rank {after.rank} on {after.host} {last.facts.to_next / 1e9:.2f}"
    found = (
        f"{slowest.backend}, messages of {slowest.message_bytes / 2**20:.0f} MiB: all_gather "
        f"{slowest.all_gather / 1e9:.2f} GB/s per rank, all_reduce {reduced / 1e9:.2f}; slowest neighbours {neighbours}"
    )
    return [_judge_pass(examination, found, slowest), *_uneven(readings)]


def _uneven(readings: list[Reading]) -> list[Finding]:
    """Compare links within nodes with each other, and links between nodes with each other."""
    findings = []
    after = {part.rank: readings[(part.rank + 1) % len(readings)] for part in readings}
    for inside, name in ((True, "within nodes"), (False, "between nodes")):
        links = [part for part in readings if (part.host == after[part.rank].host) == inside]
        slow, fast = (kind(links, key=lambda part: part.facts.to_next, default=None) for kind in (min, max))
        if slow and fast and fast.facts.to_next > UNEVEN * slow.facts.to_next:
            findings.append(
                yellow(
                    f"{name}, rank {slow.rank} on {slow.host} sends {slow.facts.to_next / 1e9:.2f} GB/s to the next, "
                    f"rank {fast.rank} on {fast.host} {fast.facts.to_next / 1e9:.2f}",
                    "check the slow one: nvidia-smi topo -m, nvidia-smi nvlink --status, ibstat",
                )
            )
    return findings


def _judge_pass(examination: Examination, found: str, rates: Rates) -> Finding:
    """Judge the bandwidth by what this model sends in a pass."""
    if examination.estimate is None:
        return green(found)
    sent = PASSES * examination.estimate.num_parameters * element_bytes(examination.config)
    taken = sent * (world_size() - 1) / world_size() / rates.all_gather
    found = f"{found}; a pass sends {sent / 1e9:.2f} GB, {taken:.1f} s at this rate"
    if taken <= PASS_S:
        return green(found)
    return yellow(
        f"{found}, expected at most {PASS_S:g} s",
        "check that NCCL uses the fast network (NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME); use a larger "
        "train.micro_batch_size, train.precision=bf16, or deepspeed=zero3_multinode",
    )


def read_engine(examination: Examination) -> dict[str, Any]:
    """Return the engine's settings. Collective."""
    return deepspeed_settings(examination.config)


def judge_engine(examination: Examination, readings: list[Reading]) -> list[Finding]:
    settings = readings[0].facts
    return [
        green(
            f"{examination.config.deepspeed}: {settings['train_batch_size']} images per step = {world_size()} ranks x "
            f"{settings['train_micro_batch_size_per_gpu']} x {settings['gradient_accumulation_steps']} passes"
        )
    ]
