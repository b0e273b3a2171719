"""Check programs and machines: versions, ranks, GPUs, memory, open files, cores, clocks."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cogvlm_ft.doctor.examination import Examination, Finding, Reading, green, red, yellow
from cogvlm_ft.planning.memory import GIB
from cogvlm_ft.planning.preflight import cgroup_limit
from cogvlm_ft.runtime.distributed import barrier, device, world_size
from cogvlm_ft.tracking.provenance import git_state

PACKAGE = "cogvlm-ft"
SHOWN = ("torch", "deepspeed", "transformers")
INSTALL = "pip install -c constraints.txt -e ."
TAKEN_GIB = 2.0  # of a GPU's memory by other processes; this process itself takes almost 1 GiB
OPEN_FILES = 1024  # a loader process keeps up to 64 shards open, and a file for every prefetched batch
CLOCKS_S = 2.0  # difference; above it, logs of several nodes are hard to compare
PREFETCHED = 3  # batches of a loader process: two ready, one in preparation
IN_FLIGHT_MIB = 32  # of shared memory that NCCL takes per rank; an estimate


class Versions(NamedTuple):
    """Installed requirements of setup.py. problems: package -> (found, expected)."""

    installed: dict[str, str]
    problems: dict[str, tuple[str, str]]
    commit: str


def read_versions(_: Examination) -> Versions:
    installed, problems = {"python": platform.python_version()}, {}
    expected_python = metadata.metadata(PACKAGE)["Requires-Python"] or ""
    if not SpecifierSet(expected_python).contains(installed["python"], prereleases=True):
        problems["python"] = (installed["python"], expected_python)
    for requirement in map(Requirement, metadata.requires(PACKAGE) or ()):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found = "nothing"
        installed[requirement.name] = found
        if found == "nothing" or not requirement.specifier.contains(found, prereleases=True):
            problems[requirement.name] = (found, str(requirement.specifier))
    code = git_state()
    return Versions(installed, problems, f"{code.commit}{' with changes' if code.dirty else ''}" if code else "unknown")


def judge_versions(_: Examination, readings: list[Reading]) -> list[Finding]:
    first: Versions = readings[0].facts
    findings = []
    for package in sorted({name for part in readings for name in part.facts.problems}):
        part = next(part for part in readings if package in part.facts.problems)
        found, expected = part.facts.problems[package]
        findings.append(red(f"{package}: found {found} on {part.host}", expected, INSTALL))
    for package, version in first.installed.items():
        other = next((part for part in readings if part.facts.installed.get(package) != version), None)
        if other:
            found = f"{package} {version} on {readings[0].host}, {other.facts.installed.get(package)} on {other.host}"
            findings.append(
                red(found, "the same on every rank", "use one environment on a file system that all nodes share")
            )
    stray = next((part for part in readings if part.facts.commit != first.commit), None)
    if stray:
        findings.append(
            yellow(
                f"the code is {first.commit} on {readings[0].host}, {stray.facts.commit} on {stray.host}",
                "run the same clone on all nodes",
            )
        )
    shown = ", ".join(f"{name} {first.installed[name]}" for name in ("python", *SHOWN))
    return findings or [green(f"{shown}, and {len(first.installed) - 1 - len(SHOWN)} others as setup.py requires")]


def judge_ranks(examination: Examination, readings: list[Reading]) -> list[Finding]:
    ranks = Counter(part.host for part in readings)
    hosts = ", ".join(f"{host} x {number}" for host, number in ranks.items())
    found = f"{len(readings)} on {len(ranks)} host{'s' * (len(ranks) > 1)}: {hosts}"
    if len(set(ranks.values())) > 1:
        return [
            yellow(
                f"{found}: unequal numbers", "start the same number on every node: the node with most sets the limits"
            )
        ]
    return [green(found)]


class Gpu(NamedTuple):
    """The GPU of one rank. num_visible: GPUs of the node that this rank may use."""

    name: str
    gib: float
    taken_gib: float
    num_visible: int
    versions: str
    has_bf16: bool


def read_gpu(_: Examination) -> Gpu | None:
    """Compute on the GPU, which fails if torch was not built for it, and return its facts; None without GPUs."""
    if device().type != "cuda":
        if Path("/proc/driver/nvidia").exists():
            raise RuntimeError(f"an NVIDIA driver is installed, but torch {torch.__version__} finds no usable GPU")
        return None
    ones = torch.ones(64, 64, device=device())
    assert float((ones @ ones).sum()) == 64.0**3
    free, total = torch.cuda.mem_get_info(device())
    own = torch.cuda.memory_reserved(device())
    return Gpu(
        name=torch.cuda.get_device_name(device()),
        gib=total / GIB,
        taken_gib=(total - free - own) / GIB,
        num_visible=torch.cuda.device_count(),
        versions=f"CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}",
        has_bf16=torch.cuda.is_bf16_supported(including_emulation=False),
    )


def judge_gpus(examination: Examination, readings: list[Reading]) -> list[Finding]:
    gpus = [part for part in readings if part.facts]
    if not gpus:
        return [yellow("none; training runs on the CPU", "the 17B model needs GPUs; tiny models do not")]
    if len(gpus) < len(readings):
        missing = next(part for part in readings if not part.facts)
        return [red(f"none on {missing.host}", "one for every rank", "start ranks only on nodes with GPUs")]
    kinds = Counter((part.facts.name, round(part.facts.gib)) for part in gpus)
    found = ", ".join(f"{number} x {name} of {gib} GiB" for (name, gib), number in kinds.items())
    findings = [green(f"{found}; {gpus[0].facts.versions}")]
    if len(kinds) > 1:
        findings.append(yellow("of several kinds", "use one kind: the slowest and the smallest limit all"))
    if len({part.facts.versions for part in gpus}) > 1:
        findings.append(
            red("CUDA or NCCL differ between ranks", "the same versions", "use one environment for all nodes")
        )
    findings += _judge_taken_memory(gpus)
    idle = gpus[0].facts.num_visible - examination.cluster.gpus_per_node
    if idle > 0 and not examination.is_alone and "CUDA_VISIBLE_DEVICES" not in os.environ:
        findings.append(yellow(f"{idle} of {gpus[0].host} have no rank", "start one rank per GPU"))
    if examination.config.train.precision == "bf16" and not all(part.facts.has_bf16 for part in gpus):
        findings.append(red("no bf16 in hardware", "bf16 for train.precision=bf16", "set train.precision=fp32"))
    return findings


def _judge_taken_memory(gpus: list[Reading]) -> list[Finding]:
    return [
        yellow(
            f"other processes take {part.facts.taken_gib:.1f} GiB of the GPU of rank {part.rank} on {part.host}",
            "find them with nvidia-smi; end your own, or use another GPU",
        )
        for part in gpus
        if part.facts.taken_gib > TAKEN_GIB
    ]


class Host(NamedTuple):
    """Facts of one node; sizes in bytes. limit: memory limit of this job's cgroup."""

    available: int
    limit: int | None
    shm_free: int
    num_files: int
    num_cores: int
    threads: str


def read_host(_: Examination) -> Host:
    return Host(
        available=psutil.virtual_memory().available,
        limit=cgroup_limit(),
        shm_free=shutil.disk_usage("/dev/shm").free,
        num_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        num_cores=len(os.sched_getaffinity(0)),
        threads=os.environ.get("OMP_NUM_THREADS", "unset"),
    )


def judge_host(examination: Examination, readings: list[Reading]) -> list[Finding]:
    """Judge by the weakest node."""
    return [
        _judge_memory(examination, min(readings, key=lambda part: _usable(part.facts))),
        _judge_shm(examination, min(readings, key=lambda part: part.facts.shm_free)),
        _judge_files(min(readings, key=lambda part: part.facts.num_files)),
        _judge_cores(examination, min(readings, key=lambda part: part.facts.num_cores)),
    ]


def _usable(host: Host) -> int:
    return host.available if host.limit is None else min(host.available, host.limit)


def _judge_memory(examination: Examination, part: Reading) -> Finding:
    usable, estimate, cluster = _usable(part.facts), examination.estimate, examination.cluster
    found = f"host memory: {usable / GIB:.1f} GiB available on {part.host}"
    if estimate is None or (examination.is_alone and not cluster.on_cpu):
        return green(found)
    on_cpu = max(estimate.peaks.values()) * cluster.gpus_per_node
    needed = on_cpu if cluster.on_cpu else estimate.host_peak
    if needed > usable:
        return yellow(
            f"{found}, and a node needs about {needed / GIB:.1f}",
            "request more memory (Slurm: --mem), end other programs there, or see launch/plan.py for smaller settings",
        )
    return green(f"{found}, a node needs about {needed / GIB:.1f}")


def _judge_shm(examination: Examination, part: Reading) -> Finding:
    config, planner = examination.config, examination.planner
    side = planner.model_config.image_size if planner else config.model.image_size or 490
    batch = config.train.micro_batch_size * 3 * side * side * 4
    per_rank = config.data.num_workers * PREFETCHED * batch + IN_FLIGHT_MIB * 2**20 * (world_size() > 1)
    needed, free = per_rank * examination.cluster.gpus_per_node, part.facts.shm_free
    found = f"/dev/shm: {free / GIB:.2f} GiB free on {part.host}, loader processes and messages need {needed / GIB:.2f}"
    if free >= needed:
        return green(found)
    return red(found, f"{needed / GIB:.2f} GiB free", "docker run --shm-size=16g or --ipc=host, or data.num_workers=0")


def _judge_files(part: Reading) -> Finding:
    found = f"open files: {part.facts.num_files} allowed on {part.host}"
    if 0 <= part.facts.num_files < OPEN_FILES:
        return yellow(f"{found}, expected {OPEN_FILES}", f"run ulimit -n {OPEN_FILES} before the start")
    return green(found if part.facts.num_files >= 0 else f"open files: no limit on {part.host}")


def _judge_cores(examination: Examination, part: Reading) -> Finding:
    ranks, workers = examination.cluster.gpus_per_node, examination.config.data.num_workers
    per_rank = part.facts.num_cores / ranks
    found = (
        f"cores: {part.facts.num_cores} for {ranks} ranks on {part.host}, each with {workers} loader processes; "
        f"OMP_NUM_THREADS {part.facts.threads}"
    )
    if per_rank < workers:
        return yellow(
            found,
            f"set data.num_workers={int(per_rank)}, or request more cores (Slurm: --cpus-per-task={workers + 1})",
        )
    return green(found)


def read_clock(_: Examination) -> float:
    """Return the time, on all ranks within a few milliseconds of each other. Collective."""
    barrier()
    return time.time()


def judge_clocks(_: Examination, readings: list[Reading]) -> list[Finding]:
    if len({part.host for part in readings}) == 1:
        return []
    early, late = (kind(readings, key=lambda part: part.facts) for kind in (min, max))
    apart = late.facts - early.facts
    if apart > CLOCKS_S:
        return [yellow(f"{late.host} is {apart:.1f} s ahead of {early.host}", "synchronise both with chrony or ntpd")]
    return [green(f"at most {apart:.3f} s apart")]
