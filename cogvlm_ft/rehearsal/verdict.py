"""Judge the real run on the same photos: the 17B model on 1, 2 and 4 nodes of 8 GPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cogvlm_ft.model import CogVLMConfig
from cogvlm_ft.plain_files import read_json
from cogvlm_ft.planning.data_turns import largest_pass
from cogvlm_ft.planning.memory import GIB, Cluster, Planner, judge
from cogvlm_ft.planning.preflight import count_images
from cogvlm_ft.planning.step_time import H100_TFLOPS, Speeds, number_format, time_step
from cogvlm_ft.settings import Config

NODES, GPUS_PER_NODE, GPU_GIB = (1, 2, 4), 8, 79.0  # what torch sees of an 80 GB GPU


def judge_real_run(config: Config) -> list[str]:
    """Return a line of at most 100 columns per number of nodes.

    config: of the real run, with the user's whole shard set. A global batch that the GPUs cannot divide is raised to
    the next that they can.
    """
    sizes = CogVLMConfig()
    model = sizes.at_image_size(config.model.image_size) if config.model.image_size else sizes
    sequences, num_images = largest_pass(config, model), count_images(config)
    speeds = Speeds(tflops=H100_TFLOPS[number_format(config)])
    planner = Planner(config, model, Cluster(1, GPUS_PER_NODE, GPU_GIB))
    lines = []
    for num_nodes in NODES:
        cluster = Cluster(num_nodes, GPUS_PER_NODE, GPU_GIB)
        per_pass = cluster.num_gpus * config.train.micro_batch_size
        batch_size = -(-config.train.global_batch_size // per_pass) * per_pass
        divided = replace(config, train=replace(config.train, global_batch_size=batch_size))
        planner = planner.changed(divided, cluster)
        estimate = planner.estimate(sequences)
        time = time_step(planner, estimate, sequences, speeds)
        epoch = f", {_rounded(time.epoch_s(num_images))} an epoch" if num_images else ""
        peak_gib = (max(estimate.peaks.values()) + cluster.reserved_bytes) / GIB
        lines.append(
            f"{num_nodes} x {GPUS_PER_NODE} GPUs of 80 GB: {judge(estimate, cluster).status}: {peak_gib:.0f} of "
            f"{GPU_GIB:.0f} GiB; train.global_batch_size={batch_size}{epoch}"
        )
    return lines


def advice_on_size(review: Path, config: Config) -> str:
    """Return what the review recommends for small targets, unless the settings have it; "" if it recommends nothing.

    review: the folder of its results.
    """
    recommended = read_json(review / "review.json")["small_targets"]["recommended"]
    key, _, value = (recommended or "").partition("=")
    size = config.model.image_size or CogVLMConfig().image_size
    if not recommended or config.data.tiles.side_px or (key == "model.image_size" and int(value) <= size):
        return ""
    return f"Many targets are small: the review recommends {recommended} instead of {size} px (docs/small_targets.md)"


def _rounded(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return "under a minute"
    return f"about {minutes:.0f} min" if minutes < 90 else f"about {minutes / 60:.1f} h"
