"""Estimate a run before it starts: memory, time, whether it fits, what to change; as text, as JSON, and as a check."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from cogvlm_ft.adapter_settings import AdapterConfig, check_base_is_whole
from cogvlm_ft.checkpoints.choice import model_files
from cogvlm_ft.data.plan import plan_samples
from cogvlm_ft.data.reader import open_split
from cogvlm_ft.data.tiling import plan_tiles
from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model import CogVLMConfig, load_config, model_config_of
from cogvlm_ft.model.quantized import WEIGHT_FORMAT
from cogvlm_ft.pinned_memory import HOW_NOT_TO_ROUND, rounded_up_to
from cogvlm_ft.planning.activations import MicroBatchShape
from cogvlm_ft.planning.data_turns import largest_pass, most_turns_of
from cogvlm_ft.planning.evaluation_time import time_evaluation
from cogvlm_ft.planning.memory import CUDA_BYTES, GIB, UNCERTAINTY, Cluster, MemoryEstimate, Planner, Verdict, judge
from cogvlm_ft.planning.step_time import Speeds, StepTime, number_format, time_step
from cogvlm_ft.planning.suggestions import Limits, fewest_gpus_to_score, find_limits, suggest_changes
from cogvlm_ft.runtime.cores import node_id
from cogvlm_ft.runtime.distributed import computed_by_main, device, from_main, gather_to_main
from cogvlm_ft.settings import Config

logger = logging.getLogger(__name__)

CPU_PROCESS_BYTES = GIB // 2  # of a rank on CPU, with its libraries


@dataclass(frozen=True)
class Preflight:
    """All estimates for a run. num_images: of an epoch, None if not known.

    scoring: bytes of one GPU in launch/evaluate.py, by kind. fewest_gpus: on which it fits, 0 if it does not.
    """

    planner: Planner
    sequences: MicroBatchShape
    estimate: MemoryEstimate
    verdict: Verdict
    limits: Limits
    changes: list[str]
    time: StepTime
    speeds: Speeds
    num_images: int | None
    scoring: dict[str, int]
    fewest_gpus: int


def inspect_run(
    config: Config,
    model_config: CogVLMConfig,
    cluster: Cluster,
    sequences: MicroBatchShape,
    speeds: Speeds,
    num_images: int | None = None,
) -> Preflight:
    """Estimate a run whose passes have the shape `sequences`."""
    planner = whole_planner(config, model_config, cluster)
    estimate = planner.estimate(sequences)
    verdict = judge(estimate, cluster)
    return Preflight(
        planner=planner,
        sequences=sequences,
        estimate=estimate,
        verdict=verdict,
        limits=find_limits(planner, sequences),
        changes=[] if verdict.status == "fits" else suggest_changes(planner, sequences),
        time=time_step(planner, estimate, sequences, speeds),
        speeds=speeds,
        num_images=num_images,
        scoring=planner.scoring(sequences),
        fewest_gpus=fewest_gpus_to_score(planner, sequences),
    )


def whole_planner(config: Config, model_config: CogVLMConfig, cluster: Cluster) -> Planner:
    """Return the planner of a run; ConfigError where quantised weights would have to be partitioned."""
    planner = Planner(config, model_config, cluster)
    check_base_is_whole(config.adapter, cluster.num_gpus, offloads_weights=planner.zero.offload_param)
    return planner


def count_images(config: Config) -> int | None:
    """Count the images of a training epoch, tiles included; None if the shards cannot be read from here."""
    data = config.data
    try:
        reader = open_split(config, data.train_split)
        sizes = reader.index.source_sizes
        if data.tiles.side_px is not None:
            wording = load_wording(data.wording)
            sizes = plan_tiles(reader, wording, data.tiles, data.max_turns_per_image, config.seed).source_sizes(sizes)
    except (DataError, ConfigError):
        return None
    plan = plan_samples(sizes, reader.index.source_weights, global_batch_size=1, seed=config.seed)
    return plan.num_samples


def count_validation(config: Config) -> int | None:
    """Count the images of the validation split; None if it cannot be read from here."""
    try:
        return len(open_split(config, config.data.val_split))
    except (DataError, ConfigError):
        return None


def check_fits(config: Config) -> None:
    """Refuse a run that cannot fit, before anything is loaded, unless `plan` says otherwise. Collective."""
    if config.plan == "ignore":
        return
    cluster = this_cluster()
    verdict = computed_by_main(lambda: judge_start(config, cluster)[2])
    level = logging.INFO if verdict.status == "fits" else logging.WARNING
    logger.log(level, "memory: %s: %s", verdict.status, verdict.why)


def judge_start(config: Config, cluster: Cluster) -> tuple[Planner, MemoryEstimate, Verdict]:
    """Estimate the largest pass on a cluster; ConfigError if it cannot fit and plan=refuse.

    It is a pass over images with the most turns in the data. A run is refused only if it would not fit with 15 % less
    transient memory.
    """
    planner = whole_planner(config, model_config_of(config), cluster)
    estimate = planner.estimate(largest_pass(config, planner.model_config))
    verdict = judge(estimate, cluster)
    if verdict.status == "too much" and config.plan == "refuse":
        raise ConfigError(
            f"this run cannot fit on {cluster.num_gpus} {'ranks' if cluster.on_cpu else 'GPUs'}: {verdict.status}: "
            f"{verdict.why}. What would fit: {what_would_fit(planner)}. launch/plan.py shows all "
            "figures; plan=warn starts it anyway"
        )
    return planner, estimate, verdict


def check_scoring(
    config: Config, weights: Path, split: str, quantized: str | None = None, num_devices: int = 1
) -> None:
    """Refuse an evaluation of a split that cannot fit, before anything is loaded, unless `plan` says otherwise.

    Collective.

    weights: a model folder or a checkpoint. quantized, num_devices: as in `load_whole_model`.
    """
    cluster = this_cluster()
    if config.plan != "refuse":
        return
    model_config = load_config(model_files(weights), config.model.image_size, config.data.resize)
    stored = getattr(model_config, WEIGHT_FORMAT, None)
    planner = Planner(replace(config, adapter=AdapterConfig()), model_config, cluster)  # merged
    sequences = MicroBatchShape(asked_turns=most_turns_of(config, split))
    kinds = planner.scoring(sequences, stored or quantized)
    needed = sum(kinds.values()) - kinds["weights"] + kinds["weights"] // num_devices
    if needed / UNCERTAINTY + cluster.reserved_bytes > cluster.gpu_gib * GIB:
        raise ConfigError(
            f"this evaluation cannot fit on {cluster.num_gpus} {'ranks' if cluster.on_cpu else 'GPUs'}: each needs "
            f"{needed / GIB:.1f} GiB; available are {cluster.gpu_gib:.1f}. Use more of them, train.precision=bf16, or "
            "deepspeed=zero3_offload_all; plan=warn starts it anyway"
        )


def what_would_fit(planner: Planner) -> str:
    """Return what would make the largest pass fit, as text."""
    sequences = largest_pass(planner.config, planner.model_config)
    return "; or ".join(suggest_changes(planner, sequences)) or "none of the tested settings"


def this_cluster() -> Cluster:
    """Return the machines of this run; the smallest if they differ. Collective."""
    return cluster_of(from_main(gather_to_main(machine_facts())))


def machine_facts() -> tuple[str, int, int]:
    """Return this rank's node, bytes of host memory, bytes of its GPU (0 on CPU)."""
    on_cpu = device().type != "cuda"
    gpu_bytes = 0 if on_cpu else torch.cuda.get_device_properties(device()).total_memory
    return node_id(), cgroup_limit() or psutil.virtual_memory().total, gpu_bytes


def cgroup_limit() -> int | None:
    """Return the smallest memory limit of this process's cgroups, None without one; psutil reports the machine's."""
    limits = []
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, name = (
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes") if controllers else ("/sys/fs/cgroup", "memory.max")
        )
        folder = Path(root, path.lstrip("/"))
        for place in (folder, *folder.parents):
            file = place / name
            text = file.read_text(encoding="utf-8").strip() if file.is_file() else "max"
            limits += [int(text)] if text.isdecimal() else []
    least = min(limits, default=None)
    return least if least is not None and least < psutil.virtual_memory().total else None


def cluster_of(facts: Sequence[tuple[str, int, int]]) -> Cluster:
    """Build a cluster from the `machine_facts` of all ranks."""
    on_cpu = device().type != "cuda"
    ranks = Counter(node for node, _, _ in facts)
    ranks_per_node = max(ranks.values())
    host_bytes = min(memory for _, memory, _ in facts)
    gpu_bytes = host_bytes // ranks_per_node if on_cpu else min(gpu for _, _, gpu in facts)
    return Cluster(
        num_nodes=len(ranks),
        gpus_per_node=ranks_per_node,
        gpu_gib=gpu_bytes / GIB,
        host_gib=None if on_cpu else host_bytes / GIB,
        reserved_bytes=CPU_PROCESS_BYTES if on_cpu else CUDA_BYTES,
        on_cpu=on_cpu,
        rounded_up_to=rounded_up_to(os.environ),
    )


def as_json(preflight: Preflight) -> dict[str, Any]:
    """Return all estimates in bytes, seconds and operations."""
    estimate, time = preflight.estimate, preflight.time
    return {
        "verdict": asdict(preflight.verdict),
        "changes": preflight.changes,
        "limits": asdict(preflight.limits),
        "cluster": _finite(asdict(preflight.planner.cluster)),
        "pass": asdict(preflight.sequences),
        "evaluation_pass": asdict(estimate.asked_together),
        "gpu_bytes": {
            "persistent": estimate.persistent,
            "transient": estimate.transient,
            "update": estimate.update,
            "logits": estimate.logits,
            "evaluation": estimate.evaluation,
            "evaluate_program": preflight.scoring,
            "peaks": estimate.peaks,
        },
        "host_bytes": {**estimate.host, "peak": estimate.host_peak, "rounding": estimate.rounding},
        "checkpoint_bytes": estimate.disk,
        "num_parameters": estimate.num_parameters,
        "evaluate_program_fewest_gpus": preflight.fewest_gpus,
        "step": asdict(time),
        "epoch_s": time.epoch_s(preflight.num_images) if preflight.num_images else None,
        "num_images": preflight.num_images,
        "speeds": asdict(preflight.speeds),
    }


def _finite(facts: dict[str, Any]) -> dict[str, Any]:
    """Return facts without infinity, for which JSON has no number: None means without limit."""
    return {key: None if value == math.inf else value for key, value in facts.items()}


def as_text(preflight: Preflight) -> str:
    """Format all estimates for a terminal."""
    estimate, cluster, sequences = preflight.estimate, preflight.planner.cluster, preflight.sequences
    config, model = preflight.planner.config, sequences.config_of(preflight.planner.model_config)
    lines = [
        f"{estimate.num_parameters / 1e9:.2f} billion parameters, {model.image_size} px, {config.train.precision}, "
        f"{config.deepspeed}",
        f"{cluster.num_gpus} GPUs ({cluster.num_nodes} x {cluster.gpus_per_node}) of {cluster.gpu_gib:.1f} GiB; "
        f"one pass: {sequences.num_images} x {sequences.turns} turns of {sequences.turn_tokens} tokens",
        "",
        "one GPU, GiB",
        *_rows(estimate.persistent, "exact"),
        *_rows(estimate.transient, f"at the peak: {estimate.moment}"),
        _row("training, peak", estimate.peaks["training"]),
        _row("optimizer step, peak", estimate.persistent_bytes + estimate.update),
        _row("logits", estimate.logits, "for the loss, included in the peak"),
        *_rows(estimate.evaluation, f"evaluation, {_together(estimate, sequences)}"),
        _row("evaluation, peak", estimate.peaks["evaluation"]),
        "",
        "one GPU of launch/evaluate.py, GiB",
        *_rows(preflight.scoring, "no gradients, no optimizer"),
        _row(
            "peak",
            sum(preflight.scoring.values()),
            f"fewest GPUs that fit: {preflight.fewest_gpus or 'more than these'}",
        ),
        "",
        "one node, GiB of host memory",
        *_rows({kind: estimate.host[kind] for kind in ("programs", "offloaded", "start", "saving")}),
        _row("peak", estimate.host_peak, "start and saving do not coincide"),
        *_rows({"rounding": estimate.rounding}, f"included: torch rounds pinned memory up. {HOW_NOT_TO_ROUND}"),
        "",
        *_time_lines(preflight),
        "",
        f"{preflight.verdict.status}: {preflight.verdict.why}",
    ]
    lines += [f"  would fit: {change}" for change in preflight.changes]
    if cluster.num_gpus == 1 and config.deepspeed == Config.deepspeed and preflight.verdict.status == "fits":
        lines.append("deepspeed=single_gpu is faster on one GPU: weights are neither gathered nor released")
    limits = preflight.limits
    lines.append(
        f"largest values that fit, each changed alone: train.micro_batch_size={limits.micro_batch_size or 'none'}, "
        f"model.image_size={limits.image_size or 'none'}, evaluate.batch_size={limits.evaluate_batch_size or 'none'}"
    )
    return "\n".join([*lines, *_warnings(preflight)])


def _together(estimate: MemoryEstimate, sequences: MicroBatchShape) -> str:
    size, turns = estimate.asked_together, sequences.asked_turns or sequences.turns
    return f"{size.num_images} images and {size.num_turns} of {turns} turns at a time"


def _row(kind: str, size: int, note: str = "") -> str:
    return f"  {kind:<22}{size / GIB:>9.2f}  {note}".rstrip()


def _rows(sizes: dict[str, int], note: str = "") -> list[str]:
    """Format one row per kind, with the note in the first."""
    rows = [(kind, size) for kind, size in sizes.items() if size]
    return [_row(kind, size, "" if number else note) for number, (kind, size) in enumerate(rows)]


def _time_lines(preflight: Preflight) -> list[str]:
    time, speeds, config = preflight.time, preflight.speeds, preflight.planner.config
    lines = [
        f"a step: {time.num_images} images, {time.num_tokens:,} tokens, {time.num_micro_batches} passes per GPU, "
        f"{time.flops / 1e15:.2f} PFLOP and {time.recomputed_flops / 1e15:.2f} recomputed",
        f"  {time.step_s:.2f} s = computation {time.compute_s:.2f} ({speeds.mfu:.0%} of {speeds.tflops:g} TFLOP/s in "
        f"{number_format(config)}), communication {time.messages_s:.2f} ({time.messages_bytes / 1e9:.0f} GB per GPU), "
        f"update {time.update_s:.2f}; communication "
        + ("overlaps with computation" if preflight.planner.zero.overlap_comm else "is added"),
        f"a checkpoint: {preflight.estimate.disk / 1e9:.1f} GB, {time.checkpoint_s:.0f} s to write at "
        f"{speeds.disk_gb_s:g} GB/s; at most {config.checkpoint.keep_last + 2} of them",
    ]
    if preflight.num_images:
        hours = time.epoch_s(preflight.num_images) / 3600
        what = "images" if config.data.tiles.side_px is None else "images and tiles"
        lines.append(f"an epoch: {preflight.num_images:,} {what}, {hours:.2f} h with a checkpoint, without evaluation")
        evaluation = time_evaluation(
            preflight.planner, preflight.estimate, preflight.sequences, speeds, count_validation(config)
        )
        hours = evaluation.whole_s / 3600
        lines.append(f"an evaluation: {evaluation.num_looks:,} {what}, {hours:.2f} h with the longest answers")
    return lines


def _warnings(preflight: Preflight) -> list[str]:
    sequences, data = preflight.sequences, preflight.planner.config.data
    length = sequences.config_of(preflight.planner.model_config).num_patches + 3 + sequences.text_tokens
    if length <= data.max_sequence_length:
        return []
    limit = data.max_sequence_length
    return [f"every image with these turns would be rejected: {length} tokens; data.max_sequence_length={limit}"]
